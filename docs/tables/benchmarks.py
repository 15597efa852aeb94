"""Tables of speed, memory, kills and fuzzing, from the records of benchmarks/."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prime_v2.output.records import read_record
from prime_v2.output.tables import markdown, origin, with_origin


def step_table(results: Path, name: str = "training_step") -> str:
    """Training step against the causal twin."""
    record = read_record(results / f"{name}.json")
    rows = []
    for step in record["results"]["rows"]:
        low, high = step["time_ratio_range"]
        of_mdm = "–"  # measured where the head is not the one that all have
        if step.get("time_ratio_mdm") is not None:
            of_mdm = (
                f"{step['time_ratio_mdm']:.2f} [{', '.join(f'{each:.2f}' for each in step['time_ratio_mdm_range'])}]"
            )
        rows.append(
            [
                f"{step['vocab_size']:,}",
                f"{step['num_subtokens']}",
                f"`{step['objective']}`",
                f"{step['tokens_per_second']['prime']:,.0f}",
                f"{step['tokens_per_second']['causal']:,.0f}",
                f"{step['time_ratio']:.2f} [{low:.2f}, {high:.2f}]",
                of_mdm,
                f"{step['peak_mib']['prime']:,.0f} / {step['peak_mib']['causal']:,.0f} MiB",
                f"{step['memory_ratio']:.3f}",
                *(
                    f"{step['share_of_matrix_rate'][name]:.1%} of {step['matrix_rate'][name] / 1e9:,.0f} GFLOP/s"
                    for name in ("width", "square")
                ),
            ]
        )
    heads = ["V", "S", "objective", "tokens/s", "causal twin", "time ratio [range]", "to MDM", "peak memory",
             "memory ratio", "arithmetic rate, of products at D", "of square products"]  # fmt: skip
    return with_origin(heads, rows, record)


def products_table(results: Path) -> str:
    """Products with a weight matrix by PyTorch and by `linear_prime_v2`."""
    record = read_record(results / "products.json")
    rows = []
    for row in record["results"]["rows"]:
        low, high = row["speedup_range"]
        rows.append(
            [
                f"{row['matrices']}, {row['direction']}",
                " x ".join(f"{side:,}" for side in row["shape"]),
                *(f"{row['flops_per_second'][way] / 1e9:,.0f}" for way in ("pytorch", "product")),
                f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]",
            ]
        )
    heads = ["matrices", "M x K x N", "PyTorch, GFLOP/s", "`product`, GFLOP/s", "times as fast [range]"]
    return with_origin(heads, rows, record)


def generation_table(results: Path) -> str:
    """`generate` against the published algorithm."""
    record = read_record(results / "generation.json")
    shape, rows = record["results"]["shape"], []
    for row in record["results"]["rows"]:
        low, high = row["speedup_range"]
        rows.append(
            [
                f"{row['vocab_size']:,}",
                f"{shape['batch']} x {row['new_tokens']}",
                f"{shape['steps']}",
                f"{row['tokens_per_second']['generate']:,.0f}",
                f"{row['tokens_per_second']['published']:,.0f}",
                f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]",
                f"{row['passes_per_sequence']:.1f}",
            ]
        )
    heads = ["V", "tokens", "steps", "tokens/s", "published algorithm", "times as fast [range]", "passes a sequence"]
    parts = [markdown(heads, rows)]
    if blocks := record["results"].get("blocks"):
        heads = ["weights", "prompt + new tokens, block", "steps", "cache", "tokens/s",
                 "times as fast as none [range]", "nats/token added (standard error)"]  # fmt: skip
        parts.append(markdown(heads, [_block_row(row, cache) for row in blocks for cache in row["seconds"]]))
    if shares := record["results"].get("shares"):
        heads = ["sampler", "unit", "outside network and head [range]"]
        rows = [
            [row["sampler"], row["unit"], "{:.1%} [{:.1%}, {:.1%}]".format(row["share"], *row["share_range"])]
            for row in shares
        ]
        parts.append(markdown(heads, rows))
    return "\n".join(parts) + f"\n{origin(record)}"


def _block_row(row: dict[str, Any], cache: str) -> list[str]:
    texts = f"{row['batch']} x ({row['prompt']} + {row['new_tokens']}), {row['block']}"
    cells = [row["model"], texts, f"{row['steps']}", cache]
    cells.append(f"{row['tokens_per_second'][cache]:,.0f}")
    if cache == "none":
        return [*cells, "1", "0"]
    low, high = row["speedup_range"][cache]
    error = row["deviation_stderr"][cache]
    deviation = f"{row['deviation'][cache]:+.4f}" + ("" if error is None else f" ({error:.4f})")
    return [*cells, f"{row['speedup'][cache]:.2f} [{low:.2f}, {high:.2f}]", deviation]


def corrector_table(results: Path) -> str:
    """Distances of the texts of uniform-state samplers from two small laws."""
    record = read_record(results / "corrector.json")
    found, rows = record["results"]["rows"], []
    for row in found:
        name = f"corrector steps, tokens redrawn: {row['redrawn']}" if row["redrawn"] else "ancestral"
        rows.append([row["law"], name, *(f"{each:.3f}" for each in row["distances"])])
    heads = ["law", "sampler", *(f"{each} passes" for each in found[0]["passes"])]
    return with_origin(heads, rows, record)


def end_to_end_table(results: Path) -> str:
    """train.py against Trainer with Llama, and the data pipeline by itself."""
    record = read_record(results / "end_to_end.json")
    found = record["results"]
    low, high = found["time_ratio_range"]
    rows = [
        [
            "training, tokens/s",
            f"{found['tokens_per_second']['prime']:,.0f}",
            f"{found['tokens_per_second']['causal']:,.0f}",
            f"{found['time_ratio']:.2f} [{low:.2f}, {high:.2f}]",
        ],
        [
            "only data, tokens/s",
            f"{found['pipeline_tokens_per_second']['prime']:,.0f}",
            f"{found['pipeline_tokens_per_second']['plain']:,.0f}",
            f"{found['pipeline_tokens_per_second']['plain'] / found['pipeline_tokens_per_second']['prime']:.2f}",
        ],
    ]
    return with_origin(["", "prime-v2", "Trainer with Llama", "time ratio [range]"], rows, record)


def growth_table(results: Path) -> str:
    """Slopes of time and peak memory."""
    record = read_record(results / "growth.json")
    rows = [
        [
            {"batch": "B", "length": "L", "vocab_size": "V"}[axis["axis"]] + f", {axis['sizes'][0]:,} to "
            f"{axis['sizes'][-1]:,}",
            *(f"{axis['slopes'][kind][what]:.2f}" for what in ("seconds", "peak_mib") for kind in ("prime", "causal")),
        ]
        for axis in record["results"]["axes"]
    ]
    heads = ["grows", "time", "causal twin's time", "peak memory", "causal twin's peak memory"]
    return with_origin(heads, rows, record)


def startup_table(results: Path) -> str:
    """Starts of a process."""
    record = read_record(results / "startup.json")
    rows = [[f"`{name}`", f"{1000 * each:,.0f} ms"] for name, each in record["results"]["seconds_median"].items()]
    rows += [[f"`{name}`", f"{1000 * each:+,.0f} ms"] for name, each in record["results"]["added_median"].items()]
    return with_origin(["start", "median"], rows, record)


def busy_table(results: Path) -> str:
    """Tokens/s by how threads wait, on an idle and on a busy machine, and as shares of the idle default."""
    record = read_record(results / "busy_machine.json")
    rows = []
    for row in record["results"]["settings"]:
        name = f"`{row['setting']}`" + (" (what is set)" if row["is_the_choice"] else "")
        cells = []
        for condition in ("idle", "busy"):
            share = row[condition]["of_the_idle_default"]
            low, high = share["range"]
            cells += [f"{row[condition]['tokens_per_second']:,.0f}", f"{share['median']:.0%} [{low:.0%}, {high:.0%}]"]
        rows.append([name, *cells])
    heads = [
        "waiting",
        "idle, tokens/s",
        "of the idle default [range]",
        "busy, tokens/s",
        "of the idle default [range]",
    ]
    return with_origin(heads, rows, record)


def crash_table(results: Path) -> str:
    """Kills by the phase that they hit, and what became of the runs."""
    record = read_record(results / "crash_test.json")
    found = record["results"]
    hits = ", ".join(f"{count} {phase}" for phase, count in found["kills_by_phase"].items())
    of_kills = ["kills", f"{found['kills']}", f"{hits}; {found['runs']} runs", "", f"{found['lost_runs']}"]
    rows = [[*of_kills, f"{found['runs_with_other_weights']}"]]
    if pairs := found.get("two_processes"):
        where = f"{pairs['one_refused']} at once, {pairs['one_after_the_other']} one after the other"
        rows.append(["two at once", f"{pairs['pairs']}", where, f"{pairs['one_refused']}", f"{pairs['wrong']}", "0"])
    if tampered := found.get("tampering"):
        ended = [f"{tampered[each]}" for each in ("refused", "no_sentence", "other_weights")]
        rows.append(["tampering", f"{tampered['tampers']}", f"{tampered['equal']} ended all the same", *ended])
    return with_origin(["test", "cases", "in", "refused by a sentence", "lost", "other weights"], rows, record)


def fuzz_table(results: Path) -> str:
    """Cases of each fuzzed surface."""
    record = read_record(results / "fuzz.json")
    rows = [
        [
            f"`{row['file'].removeprefix('tests/')}`",
            *(f"{row[kind]:,}" for kind in ("cases", "answered", "refused", "tests_passed", "tests_failed")),
        ]
        for row in record["results"]["files"]
    ]
    rows.append(["all", *(f"{sum(row[kind] for row in record['results']['files']):,}"
                          for kind in ("cases", "answered", "refused", "tests_passed", "tests_failed"))])  # fmt: skip
    heads = ["file", "cases", "answered and checked", "refused in a sentence", "tests passed", "failed"]
    return with_origin(heads, rows, record)


def versions_table(results: Path) -> str:
    """Lowest and newest versions that the suite was run with (benchmarks/versions.py)."""
    record = read_record(results / "versions.json")
    tested = {name: record["results"][name] for name in ("lowest", "newest")}
    rows = [
        [package, *(each["packages"][package] for each in tested.values())] for package in tested["lowest"]["packages"]
    ]
    counts = "; ".join(
        f"{name}: {each['passed']:,} passed, {each['failed']:,} failed, {each['skipped']:,} skipped"
        for name, each in tested.items()
    )
    tested_when = f"Python {record['versions']['python']}, {record['time_utc'][:10]}, commit {record['commit'][:10]}"
    return (
        markdown(["package", *(f"{name} tested" for name in tested)], rows)
        + f"\nTests: {counts} ({tested_when}).\n\n{origin(record)}"
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "training_step": step_table,
    "training_step_stages": partial(step_table, name="training_step_stages"),
    "products": products_table,
    "generation": generation_table,
    "corrector": corrector_table,
    "end_to_end": end_to_end_table,
    "growth": growth_table,
    "startup": startup_table,
    "busy_machine": busy_table,
    "crash_test": crash_table,
    "fuzz": fuzz_table,
    "versions": versions_table,
}
