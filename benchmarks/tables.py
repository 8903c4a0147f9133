"""Writes docs/benchmarks.md, and the block of ratios in README.md, from benchmarks/results/*.json.

    python -m benchmarks.tables            writes both
    python -m benchmarks.tables --check    writes nothing; exits 1 where one of them differs

The words are in page.md. `{{name}}` in it stands for what TABLES has under the name, or for a number of the results,
named by its path, "nbody/published/EGNN". Every figure comes from a result; aims alone are typed, here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import figures
from benchmarks.figures import (
    OURS,
    Aim,
    Aims,
    Case,
    Results,
    Table,
    at_most,
    below,
    duration,
    faster,
    figure,
    lighter,
    look_up,
    markdown,
    near_limit,
    verdict,
)

ROOT = Path(__file__).parents[1]
README, PAGE = "README.md", "docs/benchmarks.md"
_WORDS, _RESULTS = "benchmarks/page.md", "benchmarks/results"
_BLOCK = re.compile(r"(?<=<!-- ratios, by benchmarks\.tables -->\n).*?(?=<!-- end of ratios -->)", re.DOTALL)

# By how much the time of one item may grow for the whole to count as linear.
_LINEAR = 1.25
_PYG, _SDPA, _LOCAL = "PyTorch Geometric", "PyTorch's fused attention", "local-attention (own blocks)"

_BARE, _MODULE, _PLAIN = "torch SDPA, bare", "torch.nn.MultiheadAttention", f"{OURS}, without weights"

AIMS: Aims = {
    "dense/attend, length 1024, forward*": [faster(1.1, _BARE)],
    "dense/attend, length 1024, causal, *": [faster(1.5, _BARE)],
    "dense/attend, bfloat16, *": [faster(1.3, f"{OURS}, float32")],
    "dense/attend, bfloat16, length 1024, *": [faster(1, _BARE)],
    "dense/attend, length 1024, bias*": [faster(1.2, _BARE)],
    "dense/attend, length 1024, gradient penalty": [faster(2, "torch SDPA, math")],
    "dense/attend, 1 x 512, dropout*": [faster(3, _BARE)],
    **{f"dense/attend, length {length}, *": [faster(1, _BARE)] for length in (64, 128, 256, 512, 2048, 4096)},
    "dense/module of width 256, 4 x 1024, dropout 0.1*": [
        at_most(1.15, _PLAIN),
        faster(1.3, _MODULE),
        Aim(
            "without weights at most 1.6 of without dropout",
            lambda case: (
                case.over(f"{OURS}, without weights") <= 1.6 * case.over(f"{OURS}, without weights and dropout")
            ),
        ),
    ],
    "dense/module of width 256, 1 x 4096*": [faster(1.8, _MODULE), lighter(4, _MODULE)],
    "decode/*heads first, batch*": [faster(1, _BARE)],
    "decode/*keys, batch*": [Aim("views within 1.5", lambda case: all(case.over(name) <= 1.5 for name in case.others))],
    "switch/nn.TransformerEncoder*": [faster(3, "PyTorch")],
    "generation/causal*": [faster(1, "torch SDPA")],
    "generation/window*": [faster(1.5, "torch SDPA")],
    "small/dense*, forward": [
        Aim("15 us beside PyTorch", lambda case: case.found[OURS]["median"] - case.found[_BARE]["median"] <= 15e-6)
    ],
    "graph/layers/GAT layer*": [faster(25, _PYG), faster(6, "DGL")],
    "graph/layers/GATv2 layer*": [faster(20, _PYG), faster(8, "DGL")],
    "graph/layers/dot layer*": [faster(15, _PYG), faster(6, "DGL")],
    "graph/drop_in/GATConv*": [at_most(1.4, "limit: three products and the rows read each way")],
    "graph/drop_in/two GATConv, compiled*": [at_most(1, f"{OURS}, not compiled")],
    "hetero/HGT layer*": [faster(10, _PYG), near_limit(1.6)],
    "hetero/HAN layer*": [faster(3, _PYG)],
    "reorder/layers/*": [faster(1.3, "shuffled")],
    "graph/operation/*": [faster(8, "DGL")],
    "graph/tolokers/*": [faster(15, _PYG), lighter(8, _PYG)],
    "graph/cora/two attention layers*": [faster(5, _PYG)],
    "graph/cora/one call*": [Aim("under 1 ms", lambda case: case.found[OURS]["median"] < 1e-3)],
    "graph/epoch/*": [faster(5, f"{_PYG}, dense features")],
    "graph/memory/GAT*": [at_most(1 / 10, _PYG), at_most(1, "DGL")],
    "graph/memory/dot*": [at_most(1 / 8, _PYG)],
    "graph/skew/*": [Aim("at most 1.3", lambda case: case.over(f"{OURS}, skewed degrees") <= 1.3)],
    "graph/large/*": [below(16, "peak GiB of the process")],
    "graph/kernels/*, forward": [near_limit(2)],
    "graph/kernels/*, backward": [near_limit(2.5)],
    "sparse/window/forward": [faster(2, "FlexAttention"), faster(4.5, _LOCAL)],
    "sparse/window/forward+backward": [faster(3, _LOCAL), at_most(4.5, f"{OURS}, forward")],
    "sparse/patterns/*, over the share of dense SDPA": [below(2.5, "ratio")],
    "sparse/causal/*": [faster(1.3, "dense SDPA, is_causal")],
    "sparse/documents/log-uniform*": [faster(1.5, "padded SDPA")],
    "sparse/documents/equal*": [faster(1, "padded SDPA")],
    "sparse/topk/forward": [
        faster(2.5, "matrix product, torch.topk"),
        faster(1, "dense SDPA, all keys"),
        Aim("under 300 MB", lambda case: case.found[OURS]["peak_bytes"] < 3e8),
    ],
    "geometric/all_pairs/*heads, forward+backward": [at_most(4, _SDPA)],
    "geometric/attention/attend*, over the larger limit": [below(3, "random"), below(3, "sorted")],
    "geometric/neighbours/radius graph*": [at_most(1.3, "vesin, pairs alone")],
    **{
        f"startup/imports/{name}": [below(150, "after import torch")]
        for name in ("import anyattention", "attend and Graph", "every public name")
    },
    "startup/help/*": [below(150, "milliseconds")],
    "sampling/batches/uniform": [faster(1.5, "DGL"), faster(1.5, "DGL, fused")],
    "sampling/workers/*": [faster(1.5, f"{OURS}, 1 worker")],
    "memory/exact/*": [
        faster(0.95, "TopK, forward"),
        Aim(
            "with any gradients at most 1.3 x TopK's forward",
            lambda case: all(
                case.over(name) <= 1.3 * case.over("TopK, forward") for name in case.others if "gradient" in name
            ),
        ),
    ],
    "memory/approximate/keys of 12*000": [faster(10, f"{OURS}, exact"), faster(1, "usearch")],
    "mapped_memory/forward": [
        Aim("0.7 of the rate of pread", lambda case: case.over("limit: read by pread") >= 0.7),
    ],
    "product_keys/training/forward+backward, ? thread*": [
        faster(3, "PyTorch"),
        Aim(
            "in factors a quarter of its memory",
            lambda case: 4 * case.found[f"{OURS}, in factors"]["peak_bytes"] <= case.found["PyTorch"]["peak_bytes"],
        ),
    ],
    "searches/*/*": [Aim("at most 3 x the better", lambda case: all(case.over(name) >= 1 / 3 for name in case.others))],
}


class Ratio(NamedTuple):
    """A ratio of README: what, beside whom, and its number, above 1 where we do better."""

    what: str
    beside: str
    number: Callable[[Results], float]


def _of(path: str, other: str) -> Callable[[Results], float]:
    return lambda results: Case(look_up(results, path)).over(other)


def _memory(path: str, other: str) -> Callable[[Results], float]:
    return lambda results: Case(look_up(results, path)).memory_over(other)


def _nbody_error(results: Results) -> float:
    """EGNN's error over ours after a minute, each at the rate that did better by then."""
    means = {name: error["mean"] for name, error in look_up(results, "nbody/test error/60").items()}
    ours, theirs = (min(means[name] for name in means if name.startswith(who)) for who in (OURS, "egnn"))
    return theirs / ours


_SWITCHED = "switch/nn.TransformerEncoder, 6 layers of 256, 8 heads, length 4,096, Window(128, 128), training step"
_GAT, _FLEX = "graph/layers/GAT layer, forward+backward", "FlexAttention"
_NEARLY = "memory/approximate/keys of 12 dimensions mapped to 64, 1,000,000"
GAINS = (
    Ratio("GAT layer, forward and backward", _PYG, _of(_GAT, _PYG)),
    Ratio("the same", "DGL", _of(_GAT, "DGL")),
    Ratio("its peak memory", _PYG, _memory(_GAT, _PYG)),
    Ratio("window of 256 keys either side, forward", _FLEX, _of("sparse/window/forward", _FLEX)),
    Ratio("strided causal pattern, forward", _FLEX, _of("sparse/patterns/Strided, causal", _FLEX)),
    Ratio("32 best of a million keys", "`torch.topk`", _of("sparse/topk/forward", "matrix product, torch.topk")),
    Ratio("the same, 95 % of them", "usearch", _of(_NEARLY, "usearch")),
    Ratio(
        "causal, length 1,024, forward and backward",
        "PyTorch",
        _of("dense/attend, length 1024, causal, forward+backward", "torch SDPA, bare"),
    ),
    Ratio("encoder given a window, training", "PyTorch", _of(_SWITCHED, "PyTorch")),
    Ratio("n-body error after a minute of training", "EGNN", _nbody_error),
)
LOSSES = (
    Ratio("length 64, forward and backward", "PyTorch", _of("dense/attend, length 64, forward+backward", _BARE)),
    Ratio("a token over 4,096 keys", "PyTorch", _of("decode/all of 4,096 keys, heads first, batch 1", _BARE)),
    Ratio(
        "tokens of a small Llama",
        "PyTorch",
        _of("generation/causal, prompt 512, 256 new tokens", "torch SDPA"),
    ),
    Ratio(
        "two compiled `GATConv`",
        "uncompiled",
        _of("graph/drop_in/two GATConv, compiled whole, forward+backward", f"{OURS}, not compiled"),
    ),
    Ratio("one query of a million memories", "usearch", _of(f"{_NEARLY}, one query", "usearch")),
    Ratio("8 x 8 pairs, forward", "PyTorch", _of("small/dense, 8 x 8 pairs, forward", "torch SDPA, bare")),
    Ratio("peak memory of the dot-product layer", "DGL", _of("graph/memory/dot, peak MiB above the inputs", "DGL")),
    Ratio(
        "equivariant attention, all pairs, 4 heads",
        "dense attention",
        _of("geometric/all_pairs/all pairs, 1024 points, 4 heads, forward+backward", _SDPA),
    ),
)


def block(results: Results) -> str:
    """README's ratios."""
    gains = [[ratio.what, ratio.beside, f"{figure(ratio.number(results))} x"] for ratio in GAINS]
    losses = [f"{ratio.what}, beside {ratio.beside}: {figure(ratio.number(results))} x" for ratio in LOSSES]
    return f"{markdown(['case', 'beside', 'ratio'], gains)}\n\nWhere we lose: {'; '.join(losses)}.\n"


def environments(results: Results) -> str:
    """Where each file comes from; of the versions those that it records."""
    rows = []
    for name, content in results.items():
        about = content["environment"]
        versions = [f"{library} {number}" for library, number in about["versions"].items() if number]
        machine = f"{about['processor']}, threads: {about['threads']}"
        commit = about["commit"].replace("-dirty", " and changes")
        rows.append([f"{name}.json", about["date"], machine, about["kernels"], commit, ", ".join(versions)])
    return markdown(["file", "date", "machine", "kernels", "commit", "versions"], rows)


def accuracies(results: Results) -> str:
    """Node classification: mean and standard deviation over the runs."""
    rows = []
    for name, label in (
        ("digits", "digits, 10 labels of each class"),
        ("cora", "Cora, public split"),
        ("tolokers", "Tolokers, ten splits"),
        ("debian", "Debian's packages, 45 sections, 6,241 known"),
    ):
        content = results[f"accuracy-{name}"]
        deviations = [s["standard_deviation"] for s in content["summary"].values()]
        places = 4 if any(each is not None and each < 0.001 for each in deviations) else 3
        scores = {
            who: f"{s['mean']:.{places}f}" + ("" if each is None else f" ± {each:.{places}f}")
            for (who, s), each in zip(content["summary"].items(), deviations, strict=True)
        }
        ours = scores.pop(OURS)
        others = [*(f"{who} {score}" for who, score in scores.items()), (content["published"] or "").replace("+-", "±")]
        rows.append(
            [
                label,
                content["metric"].replace("roc_auc", "ROC AUC"),
                figure(content.get("seeds", len(content["runs"]))),
                ours,
                "; ".join(filter(None, others)),
            ]
        )
    return markdown(["task", "score", "runs", OURS, "others"], rows)


def digits_attention(results: Results) -> str:
    """Where the digits' attention goes, and what it is worth, each with its aim."""
    content = results["accuracy-digits"]
    learnt, evenly = (content["attention within the class"][kind] for kind in ("learnt", "evenly paid"))
    on, off = (content["summary"][who]["mean"] for who in (OURS, "attention off"))
    rows = [
        [
            "attention to digits of the same number",
            f"{learnt:.1%}",
            f"{evenly:.1%}",
            f"10 points more: {verdict(learnt - evenly >= 0.1)}",
        ],
        ["test digits read correctly", f"{on:.1%}", f"{off:.1%}", f"1 point more: {verdict(on - off >= 0.01)}"],
    ]
    return markdown(["share", "attention", "attention off: paid evenly", "aim"], rows)


def mini_batches(results: Results) -> str:
    """Training on all nodes at once and in batches, and whether the scores are as near as they are meant to be."""
    cases = look_up(results, "mini_batches")
    rows = [
        [
            name,
            f"{100 * cases[name]['ROC AUC']:.2f} ± {100 * cases[name]['standard deviation']:.2f}",
            figure(cases[name]["epochs"]),
            f"{figure(cases[name]['seconds'])} s",
            f"{figure(cases[name]['MiB of a step'])} MiB",
        ]
        for name in ("all nodes", "in batches")
    ]
    points = cases["points gained"]
    table = markdown(["a step over", "test ROC AUC, points", "epochs", "a fit", "memory of a step"], rows)
    return f"{table}\n\nIn batches: {points:+.2f} points (aim: within 0.5: {verdict(abs(points) <= 0.5)})."


def debian_aim(results: Results) -> str:
    """What was to be reached on Debian's packages, and whether it was."""
    summary = results["accuracy-debian"]["summary"]
    own, hgt = summary[OURS]["mean"], summary["HGTConv"]["mean"]
    required = own >= 0.82 and own >= hgt
    return f"0.82 and no less than HGTConv, is {verdict(required)}; the further one, 0.84, is {verdict(own >= 0.84)}."


def language_steps(results: Results) -> str:
    """Time and memory of a training step of the language model."""
    steps = look_up(results, "sequence/step")
    rows = [[step["name"], duration(step["seconds"]), f"{figure(step['peak'] / 2**20)} MiB"] for step in steps]
    return markdown(["a step with attention over", "time", "peak memory"], rows)


def particle_errors(results: Results) -> str:
    """Energies and forces of particles: errors of the two models, and of no model."""
    found = look_up(results, "points")
    rows = [
        [name, figure(found["parameters"].get(key)), *map(figure, found["errors"][key].values())]
        for key, name in (
            ("equivariant", "equivariant attention"),
            ("plain", "plain transformer"),
            ("mean", "mean of the training data"),
        )
    ]
    return markdown(["model", "parameters", "energy MAE", "energy RMSE", "force MAE", "force RMSE"], rows)


def nbody_errors(results: Results) -> str:
    """The n-body task: mean error over the seeds after so many seconds, lowest to highest."""
    runs = look_up(results, "nbody/runs")
    rows = [
        [seconds, *(f"{figure(e['mean'])} ({figure(e['low'])} to {figure(e['high'])})" for e in map(errors.get, runs))]
        for seconds, errors in look_up(results, "nbody/test error").items()
    ]
    return markdown(["seconds", *(f"{run['name']}, rate {run['learning_rate']:g}" for run in runs.values())], rows)


def edge_growth(results: Results) -> str:
    """By what factor the time of an edge grows from the smallest to the largest graph, ours and the limit's."""
    first, *_, last = look_up(results, "graph/growth").values()
    ours, limit = (last[name] / first[name] for name in (OURS, "limit"))
    return f"{figure(ours)}, the limit's by {figure(limit)} (aim: no more than the limit's: {verdict(ours <= limit)})"


def thread_gain(results: Results) -> str:
    """Whether each kernel gains from a second thread as the limit does."""
    gains = {name: found["one thread over two"] for name, found in look_up(results, "graph/threads").items()}
    limit = gains.pop("limit")
    return f"aim: at least 0.9 of the limit's gain: {verdict(min(gains.values()) >= 0.9 * limit)}"


def search_growth(results: Results) -> str:
    """By what factor the time of a point grows in the search, from the fewest points to the most: ours and vesin's."""
    found = look_up(results, "geometric/neighbours")
    grown = found["time per point over that of the fewest"]
    counts = [int(count) for count in grown]
    vesin = [case["vesin, pairs alone"]["median"] for title, case in found.items() if title.startswith("radius")]
    theirs = vesin[-1] / vesin[0] * counts[0] / counts[-1]
    return f"{_linear(grown[str(counts[-1])])}, vesin's own by {figure(theirs)}"


def growth(path: str, *keys: str) -> Table:
    """By what factor the numbers of one item grow from the first case to the last, the worst of them."""

    def write(results: Results) -> str:
        first, *_, last = look_up(results, path).values()
        return _linear(max(last[key] / first[key] for key in keys))

    return write


def _linear(factor: float) -> str:
    return f"{figure(factor)} (aim: linear, at most {_LINEAR:g}: {verdict(factor <= _LINEAR)})"


_comparisons, _numbers = partial(figures.comparisons, aims=AIMS), partial(figures.numbers, aims=AIMS)
TABLES: dict[str, Table] = {
    "environments": environments,
    "accuracies": accuracies,
    "digits attention": digits_attention,
    "mini-batches": mini_batches,
    "debian aim": debian_aim,
    "dense": _comparisons("dense"),
    "decode": _comparisons("decode"),
    "switch": _comparisons("switch"),
    "generation": _comparisons("generation"),
    "small": _comparisons("small"),
    "busy": _numbers("busy/calls", "call"),
    "graph": _comparisons(
        "graph/layers", "graph/drop_in", "graph/operation", "graph/tolokers", "graph/cora", "graph/epoch"
    ),
    "hetero": _comparisons("hetero"),
    "reorder": _comparisons("reorder/layers"),
    "reorder cost": _numbers("reorder/cost", "order"),
    "graph memory": _comparisons("graph/memory", unit="MiB"),
    "graph kernels": _comparisons("graph/kernels"),
    "graph skew": _comparisons("graph/skew"),
    "graph growth": _comparisons("graph/growth", unit="ns"),
    "edge growth": edge_growth,
    "graph threads": _numbers("graph/threads", "kernel"),
    "thread gain": thread_gain,
    "graph large": _numbers("graph/large", "graph"),
    "sparse window": _comparisons("sparse/window"),
    "sparse lengths": _numbers("sparse/lengths", "window"),
    "length growth": growth("sparse/lengths", "microseconds a position", "KiB a position"),
    "sparse patterns": _comparisons("sparse/patterns"),
    "sparse shares": _numbers("sparse/patterns", "pattern"),
    "sparse others": _comparisons("sparse/causal", "sparse/documents", "sparse/decoding", "sparse/topk"),
    "points all pairs": _comparisons("geometric/all_pairs"),
    "points neighbours": _comparisons("geometric/neighbours"),
    "search growth": search_growth,
    "memory": _comparisons("memory/exact", "memory/approximate"),
    "memory recall": _numbers("memory/approximate", "keys"),
    "mapped memory": _comparisons("mapped_memory"),
    "product keys": _comparisons("product_keys/training"),
    "searches radius": _comparisons("searches/radius"),
    "searches nearest": _comparisons("searches/nearest"),
    "sampling": _comparisons("sampling/batches", "sampling/workers"),
    "points attention": _comparisons("geometric/attention"),
    "points limits": _numbers("geometric/attention", "our time over the larger limit"),
    "points forces": _numbers("geometric/forces/per edge", "particles"),
    "force growth": growth("geometric/forces/per edge", "microseconds", "bytes"),
    "startup imports": _numbers("startup/imports", "process"),
    "startup help": _numbers("startup/help", "command"),
    "language steps": language_steps,
    "particle errors": particle_errors,
    "nbody errors": nbody_errors,
}


def read_results(root: Path = ROOT) -> Results:
    """The result files by their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((root / _RESULTS).glob("*.json"))}


def pages(results: Results, root: Path = ROOT) -> dict[str, str]:
    """The whole text of both documents."""

    def value(place: re.Match[str]) -> str:
        name = place[1]
        return TABLES[name](results) if name in TABLES else figure(look_up(results, name))

    page = re.sub(r"\{\{(.+?)\}\}", value, (root / _WORDS).read_text())
    readme, places = _BLOCK.subn(lambda _: block(results), (root / README).read_text())
    if places != 1:
        raise SystemExit(f"{README} has {places} blocks of ratios, not one.")
    return {PAGE: page, README: readme}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write both documents, or compare them with what is there."""
    parser = argparse.ArgumentParser(description="Write the measured tables from the results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a document differs")
    is_check = parser.parse_args(arguments).check
    changed = []
    for name, text in pages(read_results(root), root).items():
        path = root / name
        if path.exists() and path.read_text() == text:
            continue
        changed.append(name)
        print(f"{name} {'differs' if is_check else 'written'}")
        if not is_check:
            path.write_text(text)
    return int(is_check and bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
