import pytest

from mindrlhf.errors import UserError
from mindrlhf.rewards.logic import knights_and_knaves_reward

LABEL = "(1) Zoey is a knave\n(2) Oliver is a knight"


def reward(answer, label=LABEL, **arguments):
    return knights_and_knaves_reward([answer], [label], **arguments)[0]


@pytest.mark.parametrize(
    "answer",
    [
        LABEL,
        "(1) Zoey is a knave (2) Oliver is a knight",
        "OLIVER IS A KNIGHT, zoey is a Knave.",
        "Zoey: knave, Oliver: knight",
        "Zoey = knave; Oliver = knight",
        "Zoey - knave\nOliver → knight",
        "- **Zoey** is a **knave**.\n- **Oliver** is the *knight*!",
        "Zoey (knave) and Oliver (knight)",
        "| Zoey | knave |\n| Oliver | knight |",
        '{"Zoey": "knave", "Oliver": "knight"}',
        "{'Zoey': 'knave', 'Oliver': 'knight'}",
        "So, Zoey is a knave, and therefore Oliver is a knight.",
        r"\text{Zoey is a knave}, \text{Oliver is a knight}",
    ],
)
@pytest.mark.parametrize("marks", ["{}", "<think>Zoey is a knight?</think><answer>{}</answer>", r"Zoey: \boxed{{{}}}"])
def test_right_answers(answer, marks):
    assert reward(marks.format(answer)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "Zoey is a knight, Oliver is a knight",
        "Zoey is a knave",  # missing
        "Zoey is a knave, Oliver is a knight, Ella is a knight",  # extra
        "Zoey is a knave, Oliver is a knight, Zoey is a knight",  # contradictory
        "Zoey is a knave, Oliver is a knight, Zoey is a knave",  # twice
        "Zoey and Oliver are knaves",
        "Zoey is a knave, Olivers is a knight",
    ],
)
def test_wrong_answers(answer):
    assert reward(answer) == 0
    assert reward(answer, right=2, wrong=-1.5, unreadable=-2) == -1.5


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know",
        "knight knave",
        "Zoey is not a knight, Oliver is not a knave",
        "Zoey is a knave or a knight, Oliver is a knight",
        "Knights: Oliver. Knaves: Zoey.",
        "<answer></answer> Zoey is a knave, Oliver is a knight",
        "Zoey is a ..., Oliver is a ...",
        "a, " * 300_000 + "knight",
        "knight " * 100_000,
        "(" * 1_000_000 + "knight",
    ],
)
def test_unreadable_answers(answer):
    assert reward(answer) == 0
    assert reward(answer, right=2, wrong=-1.5, unreadable=-2) == -2
    assert reward(answer, wrong=-1.5, partial_credit=True) == -1.5


@pytest.mark.parametrize(
    "label",
    [
        {"Zoey": "knave", "Oliver": "Knight"},
        [["Zoey", "knave"], ("Oliver", "knight")],
        ["Zoey is a knave", "Oliver is a knight"],
        '{"Zoey": "knave", "Oliver": "knight"}',
        {"solution_text_format": LABEL, "statements": "..."},
    ],
)
def test_labels(label):
    assert reward(LABEL, label) == 1
    assert reward(LABEL.replace("knight", "knave"), label) == 0


def test_several_people_at_once():
    label = {"Zoey": "knight", "Oliver": "knight", "Ella": "knave", "Al-Amin": "knave"}
    assert reward("Zoey and Oliver are knights, Ella and Al-Amin are both knaves.", label) == 1
    assert reward("Therefore Zoey, Oliver are knights. Ella, and Al-Amin are knaves.", label) == 1
    assert reward("Zoey, Oliver, and Ella are knights; Al-Amin is a knave", label) == 0


def test_partial_credit():
    label = {"A": "knight", "B": "knave", "C": "knave", "D": "knave"}
    given = {"right": 2, "wrong": -2, "partial_credit": True}
    assert reward("A: knight, B: knave, C: knave, D: knave", label, **given) == 2
    assert reward("A: knight, B: knave, C: knave, D: knight", label, **given) == 1
    assert reward("A: knave, B: knight, C: knight, D: knight", label, **given) == -2
    assert reward("A: knight, B: knave, C: knave", label, **given) == -2


def test_other_roles():
    label = {"Zoey": "liar", "Oliver": "truth-teller"}
    assert reward("Zoey is a liar, Oliver is a Truth-teller", label, roles=["truth-teller", "liar"]) == 1
    with pytest.raises(UserError, match="roles: 'knight' is not a list of two words"):
        reward("", roles="knight")
    with pytest.raises(UserError, match="who is a truth-teller and who a liar"):
        reward("", LABEL, roles=["truth-teller", "liar"])


@pytest.mark.parametrize("label", ["42", 42, {}, [True, False], {"Zoey": True}, "A: knight, A: knave"])
def test_bad_labels(label):
    with pytest.raises(UserError, match="the label .* does not say once of everybody who is a knight and who a knave"):
        reward(LABEL, label)


def test_without_labels():
    with pytest.raises(UserError, match="the knights_and_knaves reward needs a label for every prompt"):
        reward(LABEL, None)
