"""Rule-based rewards. Completions are hostile input: parsing only, in time linear in the text, never evaluating."""

import re
from collections import deque
from fractions import Fraction
from typing import Any

from mindrlhf.errors import UserError

# Longer digit strings and larger exponents are compared as text: 1e999999999 as a number would fill the memory.
MAX_NUMBER_LENGTH = 300
MAX_EXPONENT = 400

_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # \\. steps over \{ and \}
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+])?(?:\\?\$\s?[-+]?)?"  # a minus after a word, a number or a bracket subtracts
    rf"(?:\\[dt]?frac\{{[-+]?[0-9]+\}}\{{[-+]?[0-9]+\}}|(?:{_UNSIGNED})(?:[eE][-+]?[0-9]+)?(?:\s?/\s?[0-9]+)?)"
)
_DECIMAL = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.(?P<part>[0-9]*))?(?:[eE](?P<exponent>[-+]?[0-9]+))?"
)
_LATEX_FRACTION = re.compile(  # \frac{1}{2}, and TeX's \frac12
    r"(?P<sign>[-+]?)\\[dtc]?frac(?:\{(?P<a>[^{}]*)\}|(?P<a1>[0-9]))(?:\{(?P<b>[^{}]*)\}|(?P<b1>[0-9]))"
)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# Spacing and sizing of LaTeX, math delimiters, the units $ and %: nothing that tells two answers apart.
_NOISE = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[,!;:()\[\]$%]|[$%]")
_SPACE = re.compile(r"(?:\s|\\(?=\s)|~)+")


def accuracy_reward(completions: list[str], label: list[Any], **columns: Any) -> list[float]:
    """1.0 where the answer found in the completion equals the label, else 0.0. Both lists [n].

    The answer is the content of the last closed `\\boxed{...}`, else of the last `<answer>...</answer>`, else the rest
    of the line after the last `####`. A completion with none of them is right if its last number, or the whole of it,
    equals the label. A label is a number or text; text with one of these marks, like GSM8K's solutions that end in
    `#### 42`, stands for what they mark.

    Numbers are equal exactly, as fractions: 1,234 = 1234.0, 0.5 = 1/2 = \\frac{1}{2}, +3 = 3, 1e3 = 1000. `$` and `%`
    are units and ignored, so 50% = 50 and not 0.5. What is no number is compared as text, without case, white space
    (but between digits), LaTeX spacing, \\text{} and a final period.
    """
    expected = [answer_form(expected_answer(answer, "accuracy")) for answer in label]
    return [float(_is_right(text, answer)) for text, answer in zip(completions, expected, strict=True)]


def format_reward(completions: list[str], **columns: Any) -> list[float]:
    """1.0 where the completion has one of two forms, else 0.0. White space around a completion is ignored.

    1. `<think>...</think>`, white space or nothing, `<answer>...</answer>`, and nothing else: each of the four tags
       exactly once, the answer not blank.
    2. Exactly one `\\boxed{...}`, closed and not blank, at the end: after it only white space, the closing of a
       formula (`$`, `$$`, `\\)`, `\\]`) and one period may follow.
    """
    return [float(_is_tagged(text.strip()) or _is_boxed(text)) for text in completions]


def marked_answer(text: str) -> str | None:
    """The answer that a text marks as such, see accuracy_reward; None where it marks none."""
    boxes = _closed_boxes(text)
    if boxes:
        start, end = max(boxes)
        return text[start:end].strip()
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    _, mark, rest = text.rpartition("####")
    if mark:
        return rest.strip().partition("\n")[0].strip()
    return None


def require_label(label: Any, reward: str) -> None:
    """Raises UserError where there is none; `reward` is the name of who asks."""
    if label is None:
        raise UserError(
            f"the {reward} reward needs a label for every prompt: set data.label_key to the answers' column"
        )


def expected_answer(label: Any, reward: str) -> str:
    """The answer that a data set's label stands for: what it marks, else the whole of it as text."""
    require_label(label, reward)
    text = str(label)
    marked = marked_answer(text)
    return text if marked is None else marked


def answer_form(answer: str) -> str:
    """The normal form of an answer: two answers are equal, as accuracy_reward compares, where their forms are.

    A number's is its exact value as an integer or a reduced fraction ("-7", "3/4"), that of anything else its text
    without what accuracy_reward ignores. Empty for an answer that says nothing, which equals no other.
    """
    text = _normalise(answer)
    number = _parse_plain(text)
    return text if number is None else str(number)


def answer_key(completion: str) -> str:
    """The normal form of the answer that a completion gives: what a majority vote counts.

    The answer is the marked one, else the whole completion where it is a number, else its last number, else all of its
    text. Empty where there is none.
    """
    marked = marked_answer(completion)
    if marked is not None:
        return answer_form(marked)
    number = None if parse_number(completion) is not None else _last_number(completion)
    return answer_form(completion if number is None else number)


def parse_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal, power-of-ten or fraction (a/b, \\frac{a}{b}); None if it is no number.

    Thousands separators must stand at the thousands. Zero denominators, more than MAX_NUMBER_LENGTH characters and
    exponents beyond MAX_EXPONENT are no numbers.
    """
    return _parse_plain(_normalise(text))


def _is_right(completion: str, expected: str) -> bool:
    """expected: the form of the answer. What marks no answer has two readings, its last number and its whole text."""
    marked = marked_answer(completion)
    answers = [completion, _last_number(completion)] if marked is None else [marked]
    return expected != "" and any(answer is not None and answer_form(answer) == expected for answer in answers)


def _last_number(text: str) -> str | None:
    numbers = deque(_LAST_NUMBER.finditer(text.replace("−", "-")), maxlen=1)
    return numbers[0].group() if numbers else None


def _normalise(text: str) -> str:
    text = text.replace("−", "-").replace("{,}", ",")
    text = _NOISE.sub("", _TEXT_COMMAND.sub(r"\1", text)).strip()
    # A space between two digits stays: 1 1/2 is not 11/2.
    text = _SPACE.sub(lambda space: " " if _between_digits(text, space) else "", text)
    return text.removesuffix(".").casefold()


def _between_digits(text: str, space: re.Match) -> bool:
    return text[space.start() - 1 : space.start()].isdigit() and text[space.end() : space.end() + 1].isdigit()


def _parse_plain(text: str) -> Fraction | None:
    """parse_number of normalised text."""
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    match = _LATEX_FRACTION.fullmatch(text)
    if match:
        sign = match["sign"]
        numerator = match["a1"] if match["a"] is None else match["a"]
        denominator = match["b1"] if match["b"] is None else match["b"]
    else:
        sign = ""
        numerator, slash, denominator = text.partition("/")
        if not slash:
            return _parse_decimal(text)
    a, b = _parse_decimal(numerator), _parse_decimal(denominator)
    if a is None or not b:
        return None
    return -a / b if sign == "-" else a / b


def _parse_decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if not match:
        return None
    whole, part = match["whole"].replace(",", ""), match["part"] or ""
    if not whole and not part:
        return None
    exponent = match["exponent"] or "0"
    # The length first: int() of thousands of digits is slow, or an error.
    if len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    power = int(exponent) - len(part)
    value = Fraction(int(whole + part)) * Fraction(10) ** power
    return -value if match["sign"] == "-" else value


def _closed_boxes(text: str) -> list[tuple[int, int]]:
    """Start and end of the content of every \\boxed{...} whose braces close."""
    boxes, opened = [], []
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start = opened.pop() if opened else None
            if start is not None:
                boxes.append((start, match.start()))
        elif token == "{":
            opened.append(None)
        elif token.startswith("\\boxed"):
            opened.append(match.end())
    return boxes


def _is_tagged(text: str) -> bool:
    if not text.startswith("<think>") or not text.endswith("</answer>"):
        return False
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return False
    thought, opening, answer = text.removesuffix("</answer>").partition("<answer>")
    return bool(opening) and thought.rstrip().endswith("</think>") and answer.strip() != ""


def _is_boxed(text: str) -> bool:
    boxes = _closed_boxes(text)
    if len(boxes) != 1 or len(re.findall(r"\\boxed\s*\{", text)) != 1:
        return False
    (start, end), tail = boxes[0], text[boxes[0][1] + 1 :]
    tail = "".join(tail.split())
    return text[start:end].strip() != "" and tail in _ENDINGS


# A period stands inside or outside the formula.
_ENDINGS = {a + b for close in ("", "$", "$$", "\\)", "\\]") for a, b in ((close, ""), (close, "."), (".", close))}
