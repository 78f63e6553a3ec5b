"""Records of older schemas, brought up to date when they are read.

Schema 2 said in one text how a metric was measured and what the measurement turned out to be, recipe included. Schema 3
keeps the first as protocol and the second as findings of the metric; hosts, which older records do not name, get a
stand-in made of what they say of their machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from effbench.records.metric import Finding

HOST = ("platform", "cpu", "cores", "memory_bytes")  # of an environment: what tells two hosts apart
CAP = {"cpu": 1.0, "cuda": 5.0}  # seconds of one timing where the settings do not say


def upgrade(body: dict[str, Any]) -> dict[str, Any]:
    """The content of a record in the present schema; what is no record is left to the caller to refuse."""
    while (step := UPGRADES.get(body["schema"])) is not None:
        body = step(body)
    return body


def _name_calibration(body: dict[str, Any]) -> dict[str, Any]:
    """To schema 2: methods of kind `apply` were said to take no calibration data, whatever they took."""
    facts, log = body.get("facts"), body.get("log")
    tokens = log.get("calibration_tokens") if isinstance(log, dict) else None
    if isinstance(facts, dict) and facts.get("calibration_data") == "none" and type(tokens) is int and tokens:
        length = _settings(body).get("calibration_length")
        told = f"{tokens // length} sequences" if type(length) is int and length > 0 else f"{tokens:,} tokens"
        body |= {"facts": facts | {"calibration_data": told}}
    return body | {"schema": 2}


def _separate_findings(body: dict[str, Any]) -> dict[str, Any]:
    """To schema 3: findings out of protocols, metrics as lists, a stand-in for the host."""
    metrics, protocols, environment = body.get("metrics"), body.get("protocols"), body.get("environment")
    body = body | {"schema": 3}
    if isinstance(protocols, dict) and isinstance(metrics, dict):
        cap = _cap(_settings(body), protocols)
        parted = {name: separate(name, text, cap) for name, text in protocols.items() if isinstance(text, str)}
        body["protocols"] = protocols | {name: text for name, (text, _) in parted.items()}
        body["metrics"] = {name: _listed(one, parted.get(name, ("", {}))[1]) for name, one in metrics.items()}
    if isinstance(environment, dict) and environment and "host" not in environment:
        body["environment"] = environment | {"host": stand_in(environment)}
    return body


def stand_in(environment: dict[str, Any]) -> str:
    """A name for a host that gave none."""
    known = json.dumps([environment.get(name) for name in HOST])
    return f"unnamed-{hashlib.sha256(known.encode()).hexdigest()[:8]}"


def separate(metric: str, text: str, cap: float) -> tuple[str, dict[str, Finding]]:
    """Protocol and findings in a text of schema 2."""
    findings: dict[str, Finding] = {}
    for pattern, put in _PARTS:
        if pattern.search(metric) and (match := put[0].search(text)):
            protocol, more = put[1](match)
            text = text[: match.start()] + protocol.replace("CAP", f"{cap:g}") + text[match.end() :]
            findings |= more
    return text, findings


Part = tuple[re.Pattern[str], Callable[[re.Match[str]], tuple[str, dict[str, Finding]]]]


def _timing(match: re.Match[str]) -> tuple[str, dict[str, Finding]]:
    findings: dict[str, Finding] = {
        "warm_up_calls": int(match["ours"]),
        "reference_warm_up_calls": int(match["theirs"]),
        "capped": match["why"].startswith("cap"),
    }
    if match["width"]:
        findings["ratio_interval"] = round(float(match["width"]) / 100, 6)
    if match["seen"]:
        findings["device_state"] = match["seen"].removeprefix(", ")
    return ", until the ratio's interval is within 2% or CAP s are over", findings


_TIMING = re.compile(
    r"(?<=\(ABBA\))(?P<seen>,[^;]*)?; (?P<ours>\d+)\+(?P<theirs>\d+) warm-up calls, \d+ rounds, "
    r"(?:ratio's interval (?P<width>[\d.]+)% wide|too few for an interval), "
    r"stopped by the (?P<why>cap of [\d.e+-]+ s|interval within \d+%)"
)
_PARTS: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(r"^(prefill|decode)_(tok_per_s|ms_per_token|speedup)_"), (_TIMING, _timing)),
    (
        re.compile("^apply_"),
        (
            re.compile(r"(?P<what>summed over|the highest of) .*", re.DOTALL),
            lambda match: (f"{match['what']} the steps of the recipe", {}),
        ),
    ),
    (
        re.compile("^bits_per_weight$"),
        (
            re.compile(r"of the (?P<count>\d+) (?P<kind>compressed linears|linears, none of which is compressed)"),
            lambda match: (
                "of the compressed linears, or of all but the head where none is",
                {"linears": int(match["count"]), "compressed": match["kind"].startswith("compressed")},
            ),
        ),
    ),
    (
        re.compile(""),
        (
            re.compile(r", (?P<count>\d+) contexts of all tasks cut from the left"),
            lambda match: ("", {"cut_contexts": int(match["count"])}),
        ),
    ),
    (
        re.compile("^prefill_energy_"),
        (re.compile(r"; (?P<count>\d+) prefills$"), lambda match: ("; prefills", {"calls": int(match["count"])})),
    ),
    (
        re.compile("^decode_energy_"),
        (
            re.compile(r"(?P<count>\d+) x (?P<new>\d+) tokens"),
            lambda match: (f"{match['new']} tokens a call", {"calls": int(match["count"])}),
        ),
    ),
    (
        re.compile("_energy_"),
        (
            re.compile(r"(?<=idle included), (?P<seen>[^;]*)"),
            lambda match: ("", {"device_state": match["seen"]}),
        ),
    ),
)


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    cell = body.get("cell")
    settings = cell.get("settings") if isinstance(cell, dict) else None
    return settings if isinstance(settings, dict) else {}


def _cap(settings: dict[str, Any], protocols: dict[str, Any]) -> float:
    """Seconds after which timing stopped: from the texts, or from the settings where none was stopped so."""
    for text in protocols.values():
        if isinstance(text, str) and (match := re.search(r"stopped by the cap of ([\d.]+(?:e[+-]?\d+)?) s", text)):
            return float(match[1])
    seconds = settings.get("speed_seconds")
    return seconds / 2 if isinstance(seconds, (int, float)) else CAP.get(str(settings.get("device")), CAP["cpu"])


def _listed(metric: Any, findings: dict[str, Finding]) -> Any:
    """A metric as a list; what is none is left as it is, for the types to refuse."""
    if not isinstance(metric, dict) or not metric.keys() <= {"value", "low", "high", "n"} or "value" not in metric:
        return metric
    return [metric["value"], metric.get("low"), metric.get("high"), metric.get("n"), findings]


# schema k: a function to schema k + 1
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _name_calibration, 2: _separate_findings}
