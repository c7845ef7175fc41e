"""The reward of knights-and-knaves puzzles: who always tells the truth, and who always lies."""

import re
from collections.abc import Sequence
from typing import Any

from mindrlhf.errors import UserError
from mindrlhf.rewards.rules import marked_answer, require_label

_WINDOW = 500  # characters before a role in which its names stand: with it, parsing takes time linear in the text
_MARKUP = re.compile(r"\\[a-zA-Z]+|\\\\|[*`\"“”$\\{}\[\]]|(?<!\w)['’]|['’](?!\w)")
_NAME = r"(?<!\w)(?:[^\W\d_][\w'’-]*)"
_STATEMENT = re.compile(  # the end of the text before a role: names, a link, articles
    rf"(?P<names>{_NAME}(?:\s*(?:,\s*and\b|,|&|\band\b)\s*{_NAME})*)"
    r"\s*(?P<link>\bis\b|\bare\b|[:=|(→–—-])[\s:=|(>]*(?:\b(?:a|an|the|both|all)\b\s*)*$",
    re.IGNORECASE,
)
_OPENINGS = {"so", "thus", "then", "therefore", "hence", "finally", "and", "both"}


def knights_and_knaves_reward(
    completions: list[str],
    label: list[Any],
    *,
    right: float = 1.0,
    wrong: float = 0.0,
    unreadable: float | None = None,
    partial_credit: bool = False,
    roles: Sequence[str] = ("knight", "knave"),
    **columns: Any,
) -> list[float]:
    """`right` where the answer gives everybody of the label the right role, and nobody else one. Both lists [n].

    The answer is the marked one (see rules.marked_answer), else the whole completion. It is statements in any order:
    `Zoey is a knave`, `(1) Zoey: knave`, `Zoey = knave`, `Zoey and Oliver are knights`, `{"Zoey": "knave"}`. Case,
    numbering, punctuation and bold print do not count; negations and alternatives are not understood.

    wrong: of an answer with another role, or with people missing, unknown or named twice.
    unreadable: of an answer with a role that no such statement gives, or with none at all; default `wrong`.
    partial_credit: an answer that names everybody once gets wrong + (right - wrong) * (share of the right roles).
    roles: the two words, for puzzles that use others. Logic-RL (arXiv 2502.14768) has right 2, wrong -1.5, unreadable
    -2.

    A label is text of the same form, as the column `solution_text_format` of the Knights-and-Knaves data set
    (arXiv 2410.23123), a dict {"Zoey": "knave"}, or a list of pairs or sentences. Names are single words.
    """
    if isinstance(roles, str) or len(roles) != 2 or not all(isinstance(role, str) and role for role in roles):
        raise UserError(f"roles: {roles!r} is not a list of two words")
    unreadable = wrong if unreadable is None else unreadable
    rewards = []
    for text, answer in zip(completions, label, strict=True):
        expected = _expected(answer, roles)
        marked = marked_answer(text)
        found = _statements(text if marked is None else marked, roles)
        if found is None:
            rewards.append(float(unreadable))
            continue
        given = dict(found)
        named_once = len(found) == len(given) and given.keys() == expected.keys()
        share = sum(given[name] == role for name, role in expected.items()) / len(expected) if named_once else 0.0
        rewards.append(float(wrong + (right - wrong) * (share if partial_credit else share == 1)))
    return rewards


def _statements(text: str, roles: Sequence[str]) -> list[tuple[str, str]] | None:
    """(name, role) of everything that a text states, casefolded; None where a role has no name, or there is none."""
    text = _MARKUP.sub(" ", text)
    found: list[tuple[str, str]] = []
    end = 0
    for match in re.finditer(rf"(?<!\w)({'|'.join(map(re.escape, roles))})s?(?!\w)", text, re.IGNORECASE):
        statement = _STATEMENT.search(text[max(end, match.start() - _WINDOW) : match.start()])
        if statement is None:
            return None
        names = re.findall(_NAME, statement["names"])
        names = [name.casefold() for name in names if name.casefold() not in _OPENINGS]
        # Before "is" stands one name: what a comma separates from it belongs to the sentence.
        names = names if statement["link"].lower() == "are" else names[-1:]
        found += [(name, match[1].casefold()) for name in names]
        end = match.end()
    return found or None


def _expected(label: Any, roles: Sequence[str]) -> dict[str, str]:
    require_label(label, "knights_and_knaves")
    text = label
    if isinstance(text, dict):
        text = text.get("solution_text_format") or [f"{name}: {role}" for name, role in text.items()]
    if isinstance(text, (list, tuple)):
        text = "\n".join(": ".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x) for x in text)
    found = _statements(text, roles) if isinstance(text, str) else None
    if found is None or len(found) != len(dict(found)):
        raise UserError(
            f"the label {label!r:.80} does not say once of everybody who is a {roles[0]} and who a {roles[1]}, as "
            f"'(1) Zoey is a {roles[1]}' or {{'Zoey': '{roles[1]}'}} would"
        )
    return dict(found)
