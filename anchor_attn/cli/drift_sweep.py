"""`anchor-attn drift --sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchor_attn.cli.drift_run import Asked


def run_sweep(asked: "Asked", out: Path, environment: dict[str, Any], as_json: bool) -> None:
    """Every base and every extension method, on the same random query and key.

    Args:
        asked: of whose options policies, shifts, lengths, queries, theta and seed are read.
        out: folder of sweep.json, sweep.csv and sweep.png.
        environment: of the result files.
        as_json: print sweep.json instead of the tables.
    """
    from anchor_attn.cli.drift_output import print_result
    from anchor_attn.drift.pages.choice_sections import sweep_sections
    from anchor_attn.drift.pages.draw_sweep import write_sweep_picture
    from anchor_attn.drift.sweep import BASES, FACTOR, ORIGINAL_LEN, SEQ_LEN, sweep_drift
    from anchor_attn.results import write_csv, write_json

    seq_len = asked.lengths[0] if asked.lengths else SEQ_LEN
    swept = sweep_drift(
        bases=BASES if asked.theta is None else (asked.theta,),
        policies=asked.policies,
        shifts=asked.shifts,
        seq_len=seq_len,
        queries=asked.queries,
        seed=asked.seed,
    )
    meta = {
        **environment,
        "seq_len": seq_len,
        "queries": asked.queries,
        "original_len": ORIGINAL_LEN,
        "factor": FACTOR,
    }
    records = [record.record() for record in swept]
    write_json(out / "sweep.json", {"meta": meta, "records": records})
    write_csv(out / "sweep.csv", records, meta)
    written, no_picture = [out / "sweep.json", out / "sweep.csv"], None
    try:
        write_sweep_picture(out / "sweep.png", swept, f"random query and key, {seq_len:,} tokens, methods × {FACTOR:g}")
        written.append(out / "sweep.png")
    except ImportError as missing:
        no_picture = f"No sweep.png: {missing}"
    print_result(sweep_sections(swept), written, as_json, no_page=no_picture)
