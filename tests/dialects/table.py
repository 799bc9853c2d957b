"""The table flow x variants as text, and its totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from tests.dialects.outcome import NOT_COUNTED, Outcome, Verdict
from tests.dialects.registry import Flow

# Columns of measured errors, see ``Outcome``.
NUMBERS = ("codes", "source", "rewritten", "fx_quant", "inductor")

# Worst last, as the summary of a flow names them.
_ORDER = list(Verdict)


def summary(outcomes: Sequence[Outcome]) -> str:
    """``14/14 rewritten``, or each verdict with its count; variants that nothing compiles are not counted."""
    counted = [each for each in outcomes if each.verdict not in NOT_COUNTED]
    verdicts = Counter(each.verdict for each in counted)
    parts = [f"{verdicts[verdict]}/{len(counted)} {verdict}" for verdict in _ORDER if verdicts[verdict]]
    left_out = Counter(each.verdict for each in outcomes if each.verdict in NOT_COUNTED)
    parts += [f"{count} {verdict}" for verdict, count in left_out.items()]
    return ", ".join(parts)


def is_as_expected(flow: Flow, outcomes: Sequence[Outcome]) -> bool:
    """Whether every variant of ``flow`` is as expected, and one at least says something, or its library is missing."""
    if flow.missing():
        return True
    counted = any(each.verdict not in NOT_COUNTED for each in outcomes)
    return all(each.expected for each in outcomes) and (counted or flow.expected == "unsupported")


def result_table(flows: Sequence[Flow], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """One row a flow: what became of its variants, what is expected, kernels, and the largest errors if measured."""
    numbers = any(each.errors for of_flow in outcomes.values() for each in of_flow)
    headers = ["", "flow", "variants", "expected", "kernels"]
    headers += [*NUMBERS] if numbers else []
    rows = []
    for flow in flows:
        mine = outcomes[flow.name]
        if flow.missing():
            row = ["", flow.name, f"unavailable: needs {', '.join(flow.missing())}", flow.expected, ""]
        else:
            sign = "ok" if is_as_expected(flow, mine) else "NO"
            kernels = sorted({kernel for each in mine for kernel in each.kernels})
            row = [sign, flow.name, summary(mine), flow.expected, ", ".join(kernels)]
        if numbers:
            row += [_largest(mine, name) for name in NUMBERS]
        rows.append(row)
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def _largest(outcomes: Iterable[Outcome], name: str) -> str:
    values = [each.errors[name] for each in outcomes if name in each.errors]
    return f"{max(values):.1e}" if values else ""


def reason_list(flows: Sequence[Flow], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Each reason once, with the flows that it stopped and in how many of their variants."""
    stopped: dict[tuple[Verdict, str], Counter[str]] = {}
    for flow in flows:
        for each in outcomes[flow.name]:
            texts = set(each.reasons)
            if each.verdict is Verdict.SILENT:
                texts.add(f"fewer than {flow.matmuls} quantized matmuls in the report, and no graph break")
            elif each.verdict is Verdict.BROKEN:
                texts |= {f"matmuls outside the graphs: {reason}" for reason in each.graph_breaks}
            for text in texts:
                stopped.setdefault((each.verdict, text), Counter())[flow.name] += 1
    lines = []
    for (verdict, text), by_flow in sorted(stopped.items(), key=lambda item: _ORDER.index(item[0][0])):
        where = ", ".join(f"{name} ({count})" for name, count in by_flow.items())
        lines += [f"{verdict}: {text}", f"    {where}"]
    for note in dict.fromkeys(note for of_flow in outcomes.values() for each in of_flow for note in each.notes):
        where = ", ".join(name for name, of_flow in outcomes.items() if any(note in each.notes for each in of_flow))
        lines += [note, f"    {where}"]
    return "\n".join(lines)


def totals(flows: Sequence[Flow], outcomes: Mapping[str, Sequence[Outcome]], seconds: float) -> str:
    """The last line: variants by verdict, flows as expected, flows that could not be built here."""
    everything = [each for of_flow in outcomes.values() for each in of_flow]
    available = [flow for flow in flows if not flow.missing()]
    good = sum(is_as_expected(flow, outcomes[flow.name]) for flow in available)
    return (
        f"{good} of {len(available)} flows as expected, {len(flows) - len(available)} unavailable; "
        f"{summary(everything) or 'nothing run'}; {seconds:.0f} s"
    )


def wrong(flows: Sequence[Flow], outcomes: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Names of the developers' flows that are not as expected, and of every flow that is silent somewhere."""
    return [
        flow.name
        for flow in flows
        if any(each.verdict is Verdict.SILENT for each in outcomes[flow.name])
        or (flow.group == "developers" and not is_as_expected(flow, outcomes[flow.name]))
    ]
