import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mindrlhf.errors import UserError
from mindrlhf.rewards import Rewards, math_equality
from mindrlhf.rewards.math_equality import math_reward
from mindrlhf.types import Prompt

ROOT = Path(__file__).parents[2]
RIGHT = r"\boxed{\sqrt{8}}"


def alive(pid):
    try:
        # A zombie that nobody has waited for is gone too.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, seconds=60):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


@pytest.fixture()
def patient(monkeypatch):
    """The right answer may take a minute: a busy machine can delay it beyond the timeout that ends a hostile one."""
    equal = math_equality._worker.equal

    def patient_equal(gold, answer, timeout):
        return equal(gold, answer, 60 if answer == RIGHT else timeout)

    monkeypatch.setattr(math_equality._worker, "equal", patient_equal)


@pytest.mark.parametrize(
    ("label", "completion", "reward"),
    [
        ("0.5", r"\boxed{\frac12}", 1),
        ("1/2", r"\boxed{50\%}", 1),
        ("50", r"\boxed{50\%}", 1),
        (r"50\%", r"\boxed{0.5}", 1),
        ("1234", r"\boxed{1,234}", 1),
        ("1000", r"\boxed{1e3}", 1),
        (r"2\sqrt2", r"\boxed{\sqrt{8}}", 1),
        (r"$2\sqrt{2}$", r"<answer>$\sqrt{8}$</answer>", 1),
        (r"2\sqrt2", r"#### \sqrt{8}", 1),
        (r"\frac{\sqrt3}{3}", r"\boxed{\frac{1}{\sqrt{3}}}", 1),
        (r"1\frac12", r"\boxed{1.5}", 1),
        ("0.333333", r"\boxed{1/3}", 1),
        ("1/3", r"\boxed{0.33}", 0),
        ("10000000000000001", r"\boxed{10000000000000000}", 0),
        ("(1,2)", r"\boxed{\left(1, 2\right)}", 1),
        ("(1,2)", r"\boxed{(2,1)}", 0),
        ("(1,2,3)", r"\boxed{(1,3,2)}", 0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
        ("1, 2, 3", r"\boxed{3, 2, 1}", 1),
        ("[0,1)", r"\boxed{\left[0,1\right)}", 1),
        ("[0,1)", r"\boxed{[0,1]}", 0),
        ("1<x<2", r"\boxed{(1,2)}", 1),
        ("5", r"\boxed{x=5}", 1),
        ("x=5", r"\boxed{5}", 1),
        ("x=5", r"\boxed{y=5}", 0),
        ("(x+1)^2", r"\boxed{x^2+2x+1}", 1),
        (r"3\text{ cm}", r"\boxed{3}", 1),
        (r"30^\circ", r"\boxed{30}", 1),
        ("3i+2", r"\boxed{2+3i}", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}", 1),
        ("Monday", r"\boxed{\text{Monday}}", 1),
        ("Monday", r"\boxed{Tuesday}", 0),
        # where nothing is marked, math-verify looks for the answer
        ("42", "I think that it is 42.", 1),
        ("42", "42 is not the last, 43 is", 0),
        (r"2\sqrt2", r"The final answer is $\sqrt{8}$. I hope it is correct.", 1),
        ("x^2", "x^2", 1),
        # nothing, and too much
        ("42", "", 0),
        ("42", r"\boxed{}", 0),
        ("", "", 0),
        ("42", r"\boxed{" + "1+" * 5000 + "1}", 0),
        ("42", "\\boxed{" * 10_000, 0),
        ("42", "so much to say " * 10_000 + "that it is 42", 1),
        ("42", "\ud800 \\boxed{\ud800}", 0),
    ],
)
def test_forms(label, completion, reward):
    assert math_reward([completion], [label]) == {"rewards": [reward], "extra_logs": {"timeouts": [0]}}


@pytest.mark.parametrize("hostile", ["9^{9^{9^9}}", "99999999!", "(" * 900], ids=["tower", "factorial", "parentheses"])
def test_hostile_answers_are_killed(hostile, patient):
    answers = [f"\\boxed{{{hostile}}}", RIGHT, f"\\boxed{{{hostile}}}"]
    returned = math_reward(answers, [r"2\sqrt{2}"] * 3, timeout=1)
    assert returned["rewards"] == [0, 1, 0]
    # The memory limit may be faster than the timeout.
    assert returned["extra_logs"]["timeouts"] in ([1, 0, 1], [0, 0, 0])


def test_a_timeout_is_counted_and_the_next_answer_has_a_new_worker(patient):
    math_reward([RIGHT], ["3"])
    first = math_equality._worker._process.pid
    prompts = [Prompt(None, "p", r"2\sqrt{2}", i) for i in range(2)]
    rewards = Rewards([("math", lambda completions, label: math_reward(completions, label, timeout=0.2), 1.0)])
    total, parts = rewards(prompts, [r"\boxed{99999999!}", RIGHT])
    assert total.tolist() == [0, 1] and parts["math/timeouts"].tolist() == [1, 0]
    assert not alive(first) and alive(math_equality._worker._process.pid)


def test_a_worker_that_was_killed_is_started_again():
    math_reward([r"\boxed{\sqrt{8}}"], ["3"])
    process = math_equality._worker._process
    os.kill(process.pid, signal.SIGKILL)
    assert gone(process.pid)
    assert math_reward([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"]) == {"rewards": [1], "extra_logs": {"timeouts": [0]}}


def test_a_worker_that_dies_at_an_answer_costs_this_answer():
    math_reward([r"\boxed{\sqrt{8}}"], ["3"])
    pid = math_equality._worker._process.pid
    timer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    timer.start()
    returned = math_reward([r"\boxed{99999999!}", r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"] * 2, timeout=60)
    timer.join()
    assert returned == {"rewards": [0, 1], "extra_logs": {"timeouts": [1, 0]}}


def test_threads_share_the_worker():
    results = {}

    def run(number):
        results[number] = math_reward([rf"\boxed{{\sqrt{{{number * number * 2}}}}}"] * 3, [rf"{number}\sqrt{{2}}"] * 3)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {number: returned["rewards"] for number, returned in results.items()} == dict.fromkeys(range(2, 8), [1] * 3)


PARENT = """
import sys
from mindrlhf.rewards import math_equality
math_equality.math_reward([r"\\boxed{\\sqrt{8}}"], ["3"])
assert "mindspore" not in sys.modules and "sympy" not in sys.modules
process = math_equality._worker._process
modules = open(f"/proc/{process.pid}/maps").read()
print(process.pid, "mindspore" in modules, flush=True)
if sys.argv[1] == "busy":
    math_equality.math_reward([r"\\boxed{99999999!}"], ["3"], timeout=1.5)
elif sys.argv[1] == "idle":
    sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy", "exit"])
def test_the_worker_ends_with_its_parent(state):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, state], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        pid, with_mindspore = parent.stdout.readline().split()
        assert with_mindspore == "False"
        if state == "exit":
            assert parent.wait(30) == 0
        else:
            if state == "busy":
                time.sleep(0.3)
            parent.kill()
            parent.wait(30)
        assert gone(int(pid))
    finally:
        parent.kill()
        parent.wait()
        parent.stdin.close()
        parent.stdout.close()


def test_errors():
    with pytest.raises(UserError, match="the math reward needs a label for every prompt: set data.label_key"):
        math_reward(["1"], [None])
    for timeout in (0, "5", True, float("nan")):
        with pytest.raises(UserError, match="timeout: .* is not a number of seconds between 0 and 3600"):
            math_reward(["1"], ["1"], timeout=timeout)


def test_without_the_package(monkeypatch):
    math_equality._worker.close()
    monkeypatch.setattr(math_equality.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package math-verify: pip install 'mindrlhf\[math\]'"):
        math_reward([r"\boxed{\sqrt{8}}"], ["3"])


def test_a_package_that_does_not_import(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr4')")
    math_equality._worker.close()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"did not start: ImportError: no antlr4; see pip install"):
        math_reward([r"\boxed{\sqrt{8}}"], ["3"])
    (tmp_path / "math_verify.py").write_text("import os; os._exit(3)")
    with pytest.raises(UserError, match="did not start: it ended, or said nothing"):
        math_reward([r"\boxed{\sqrt{8}}"], ["3"])
