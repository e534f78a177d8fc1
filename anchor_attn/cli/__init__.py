"""CLI."""


def main(): ...
