"""The tables that `anchor-attn rope` prints."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from anchor_attn.cli.tables import create_table
from anchor_attn.rope.casts import Casts, equal_policies
from anchor_attn.rope.inspection import RopeNow, RopeUnder, list_pairs, name_pairs
from anchor_attn.rope.precision import RopePrecision
from anchor_attn.rope.search.files import SearchResult

MOST_LINES = 24  # of the table of pairs; the files have all


def describe_kind(now: RopeNow) -> str:
    """One kind of layer in two sentences."""
    original, pairs = now.original, len(now.turns)
    kind = "RoPE" if now.layer_type is None else now.layer_type
    extended = f", {now.method} × {now.factor:g}" if now.method != "default" else ", default"
    scaled = f", cos and sin × {now.attention_factor:.4f}" if now.attention_factor != 1 else ""
    kept = f", positions below {now.n_hat} as before" if now.n_hat else ""
    unturned = now.unturned_pairs
    seen = (
        f"of {pairs} pairs {len(unturned)} do not turn once in {original.length:,} tokens: {name_pairs(unturned)}"
        if unturned
        else f"all {pairs} pairs turn at least once in {original.length:,} tokens"
    )
    return (
        f"{kind}: theta {original.theta:,.0f}, {original.rotary_dim} numbers of a head rotated, trained on "
        f"{original.length:,} tokens, {now.present_len:,} now{extended}{scaled}{kept}\n  {seen}"
    )


def describe_search(result: SearchResult) -> str:
    """What was found, in a line."""
    low, high = result.factors[0], result.factors[-1]
    return (
        f"{result.factor:g} × {result.original_max_position_embeddings:,} tokens: λ from {low:.2f} to {high:.2f} over "
        f"{len(result.factors)} pairs, n̂ {result.n_hat}, cos and sin × {result.attention_factor:.4f}"
    )


def pairs_table(now: RopeNow, under: Mapping[str, RopeUnder]) -> Table:
    """A line a pair, or every so many of them, and both sides of where pairs stop turning once.

    Its foot says how much each method scales cos and sin: "ntk_by_parts" and "yarn_paper" differ in nothing else.
    """
    records = list_pairs(now, under)
    scales = {method: rope.attention_factor for method, rope in under.items() if method != "default"}
    scales = ({"now": now.attention_factor} if now.method != "default" else {}) | scales
    apart = -(-len(records) // MOST_LINES)
    first = now.unturned_pairs[0] if now.unturned_pairs else 0
    shown = {*range(0, len(records), apart), len(records) - 1, first, max(0, first - 1)}
    rows = [
        (
            str(pair),
            f"{records[pair]['wavelength_tokens']:,.1f}",
            f"{records[pair]['turns']:,.1f}" if records[pair]["turned_once"] else f"{records[pair]['turns']:.2f} *",
            *(f"{records[pair][column]:.3f}" for column in scales),
        )
        for pair in sorted(shown)
    ]
    foot = ("", "cos, sin ×", "", *(f"{scale:.3f}" for scale in scales.values()))
    header = ("pair", "wavelength", "turns", *("\n_".join(column.rsplit("_", 1)) for column in scales))
    table = create_table(header, rows, foot=foot, gap=0)  # 70 columns; 85 with "now" and "longrope"
    whole = "" if apart == 1 else f"one pair of {apart}, all of them in rope.csv; "
    table.caption = f"{whole}* has not turned once in training" if now.unturned_pairs else whole.rstrip("; ") or None
    table.caption_justify = "left"
    return table


def casts_table(casts: Sequence[Casts]) -> Table:
    """A line a way to load the model: which policies its own tables and states are equal to."""
    rows = [
        (
            each.name,
            each.frequencies,
            _equal_to(each.table),
            _equal_to(each.rotation) if each.rotation else "not seen",
        )
        for each in casts
    ]
    return create_table(("weights", "frequencies", "cos, sin as", "query, key as"), rows, "left")


def describe_casts(casts: Sequence[Casts]) -> list[str]:
    """What the lines of the table come to, equal ones together."""
    names: dict[str, list[str]] = {}
    for each in casts:
        meaning = each.meaning if each.unseen is None else f"{each.meaning}: {each.unseen}"
        names.setdefault(meaning, []).append(each.name)
    return [f"{', '.join(own)}: {meaning}" for meaning, own in names.items()]


def fitness_table(result: SearchResult) -> Table:
    """A line a start beside what was searched, for long inputs and, where it was searched, for short ones."""
    rows = [("searched", f"{result.fitness:.4f}", "")]
    rows += [(name, f"{value:.4f}", f"{value - result.fitness:+.4f}") for name, value in result.fitness_of.items()]
    if result.short_fitness is not None:
        rows.append(("searched, short inputs", f"{result.short_fitness:.4f}", ""))
        rows += [
            (f"{name}, short inputs", f"{value:.4f}", f"{value - result.short_fitness:+.4f}")
            for name, value in result.short_fitness_of.items()
        ]
    return create_table(("factors", "fitness", "above searched"), rows)


def _equal_to(apart: Mapping[RopePrecision, float]) -> str:
    same = equal_policies(apart)
    if same:
        return " = ".join(same)
    nearest = min(apart, key=lambda policy: apart[policy])
    return f"none ({nearest} {apart[nearest]:.0e} away)"
