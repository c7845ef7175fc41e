import numpy as np
import pytest

from mindrlhf.data.selection import SELECTIONS, RewardedAnswers


def group(rewards, prompt="2+2=", responses=("4", "5", "four")):
    return RewardedAnswers(prompt, responses, np.array(rewards))


def test_rejection_sampling_takes_the_best_and_of_equals_the_first():
    assert SELECTIONS["rs"](group([0.0, 1.0, 1.0])) == [{"prompt": "2+2=", "response": "5", "reward": 1.0}]


def test_conditional_sft_tells_the_reward_behind_the_prompt():
    rows = SELECTIONS["csft"](group([1.0, -0.256, 0.5]))
    assert [row["prompt"] for row in rows] == [f"2+2= <rm_score>: {r} " for r in ("1.00", "-0.26", "0.50")]
    assert [row["response"] for row in rows] == ["4", "5", "four"]
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2="}]
    rows = SELECTIONS["csft"](group([1.0, 0.0, 0.0], messages))
    assert rows[0]["prompt"] == [messages[0], {"role": "user", "content": "2+2= <rm_score>: 1.00 "}]
    assert messages[1]["content"] == "2+2="
    shared = [{"from": "human", "value": "2+2="}]
    assert SELECTIONS["csft"](group([1.0, 0.0, 0.0], shared))[0]["prompt"][0]["content"] == "2+2= <rm_score>: 1.00 "


def test_iterative_dpo_sets_the_best_against_the_worst():
    (row,) = SELECTIONS["iter_dpo"](group([0.25, 1.0, -1.0]))
    assert (row["chosen"], row["rejected"], row["margin"]) == ("5", "four", 2.0)
    assert (row["chosen_reward"], row["rejected_reward"]) == (1.0, -1.0)


@pytest.mark.parametrize("answers", [group([1.0, 1.0, 1.0]), group([1.0, 0.0, 1.0], responses=("4", "4", "4"))])
def test_iterative_dpo_has_nothing_to_learn_from_equals(answers):
    assert SELECTIONS["iter_dpo"](answers) == []
