"""Packed rows from a stream of documents: found, sharded, shuffled, mixed, packed, and resumable to the row."""

from anchor_attn.train.streaming.loading import create_loader as create_loader
from anchor_attn.train.streaming.report import SourceReport as SourceReport
from anchor_attn.train.streaming.report import StreamReport as StreamReport
from anchor_attn.train.streaming.report import read_report as read_report
from anchor_attn.train.streaming.source import StreamSource as StreamSource
from anchor_attn.train.streaming.stream import PackedStream as PackedStream
