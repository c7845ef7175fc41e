"""`mindrlhf chat`: through pipes, on a terminal, and the dialogue behind both."""

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mindrlhf.cli.main import main
from mindrlhf.config import InferenceConfig, SamplingConfig
from mindrlhf.errors import UserError
from tests.checkpoints import write_checkpoint, write_problems


@pytest.fixture(scope="module")
def model(mindspore, tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat")
    return write_checkpoint(directory / "model", write_problems(directory / "problems.jsonl", 4))


@pytest.fixture()
def chat(model, monkeypatch, capsys):
    """Run the command on lines from a pipe: exit code, standard output, standard error."""

    def run(lines, *arguments, directory=model):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        capsys.readouterr()
        code = main(["chat", "--model", str(directory), "sampling.max_tokens=8", *arguments])
        return code, *capsys.readouterr()

    return run


class Screen:
    """Keeps what is shown. `interrupt_after`: Ctrl-C at that piece of the next answer."""

    interactive = True

    def __init__(self):
        self.pieces, self.notes, self.interrupt_after = [], [], 0

    def show(self, piece):
        self.pieces.append(piece)
        if len(self.pieces) == self.interrupt_after:
            self.interrupt_after = 0
            raise KeyboardInterrupt

    def end_answer(self):
        self.answer, self.pieces = "".join(self.pieces), []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def shared_dialogue(model):
    from mindrlhf.cli.dialogue import Dialogue

    config = InferenceConfig(max_prompt_tokens=150, sampling=SamplingConfig(max_tokens=12))
    return Dialogue(str(model), config, "", Screen())


@pytest.fixture()
def dialogue(shared_dialogue):
    shared_dialogue.set_system("")
    shared_dialogue.clear()
    shared_dialogue.answers, shared_dialogue.screen = 0, Screen()
    return shared_dialogue


def roles(messages):
    return " ".join(message["role"] for message in messages)


def generated(model, tmp_path, prompts, *overrides):
    """What `mindrlhf generate` says to the prompts, which are text or lists of messages."""
    data, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    output.unlink(missing_ok=True)
    files = ["--model", str(model), "--data", str(data), "--output", str(output)]
    assert main(["generate", *files, "data.label_key=", "sampling.max_tokens=8", *overrides]) == 0
    return [json.loads(line)["completion"] for line in output.read_text().splitlines()]


def test_two_turns_through_pipes(model, tmp_path):
    """The answers of `generate`, which knows nothing of streams and of turns."""
    saved = tmp_path / "saved.jsonl"
    lines = f"How many pears?\n\n Are you sure?\n/save {saved}\n"
    command = [sys.executable, "-m", "mindrlhf", "chat", "--model", str(model), "sampling.max_tokens=8"]
    done = subprocess.run(command, input=lines.encode(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, answer, second, last = json.loads(saved.read_text())["messages"]
    assert (first, second["content"]) == ({"role": "user", "content": "How many pears?"}, "Are you sure?")
    expected = generated(model, tmp_path, [[first], [first, answer, second]], "data.apply_chat_template=true")
    assert [answer["content"], last["content"]] == expected
    shown = "".join(text if text.endswith("\n") else text + "\n" for text in expected)
    assert done.stdout.decode() == shown
    notes = done.stderr.decode().splitlines()
    assert notes[-1] == f"4 messages in {saved}"
    assert set(notes[:-1]) <= {"cut at sampling.max_tokens 8"}
    assert b"\x1b" not in done.stderr


def test_clear_retry_and_system(chat, tmp_path):
    saved = tmp_path / "saved.jsonl"
    lines = ["one", "/clear", "two", "/retry", "/system Be kind.", f"/save {saved}", "/exit", "never read"]
    code, output, errors = chat(lines, "--system", "Be short.")
    assert code == 0, errors
    system, question, answer = json.loads(saved.read_text())["messages"]
    assert (system["content"], question["content"]) == ("Be kind.", "two")
    assert output.endswith(answer["content"] if answer["content"].endswith("\n") else answer["content"] + "\n")
    assert "never read" not in output


def test_retry_samples_another_answer(dialogue):
    dialogue.say("How many?")
    first = dialogue.messages
    dialogue.retry()
    assert dialogue.messages[:1] == first[:1] and roles(dialogue.messages) == "user assistant"
    assert dialogue.messages[1] != first[1]


def test_retry_of_greedy_answers_says_that_it_is_in_vain(dialogue, monkeypatch):
    monkeypatch.setattr(dialogue, "sampling", SamplingConfig(temperature=0, max_tokens=4))
    dialogue.say("How many?")
    first = dialogue.messages
    dialogue.retry()
    assert dialogue.messages == first
    assert "sampling.temperature is 0: every try gives the same answer" in dialogue.screen.notes


def test_what_is_saved_is_read_by_sft(dialogue, chat, tmp_path):
    from mindrlhf.config import DataConfig, SourceConfig
    from mindrlhf.data.conversations import read_conversations

    saved = tmp_path / "saved.jsonl"
    chat(["one", "two", f"/save {saved}"], "--system", "Be short.")
    data = DataConfig(format="messages", apply_chat_template=True)
    sources = [SourceConfig(path=str(saved))]
    (conversation,) = read_conversations(sources, data, dialogue.tokenizer, 256, tmp_path).items
    answers = [message["content"] for message in json.loads(saved.read_text())["messages"][2::2]]
    trained = dialogue.tokenizer.decode(conversation.ids[conversation.trained])
    assert trained == "".join(answer + "<|im_end|>" for answer in answers) and len(answers) == 2


def test_without_a_chat_template_it_continues_the_text(chat, model, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    (plain / "chat_template.jinja").unlink()
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    saved = tmp_path / "saved.jsonl"
    code, _, errors = chat(["A shop has", "and", f"/save {saved}"], directory=plain)
    assert code == 0
    assert errors.startswith("no chat template in this checkpoint: it continues the text, turn after turn\n")
    first, answer, second, last = (message["content"] for message in json.loads(saved.read_text())["messages"])
    text = first + answer
    text += ("" if text[-1].isspace() else "\n") + second
    assert [answer, last] == generated(plain, tmp_path, [first, text])


def test_the_oldest_turns_leave_a_full_window(dialogue):
    dialogue.set_system("Be short.")
    for number in range(4):
        dialogue.say(f"Question {number}: " + "pears " * 12)
    notes = [note for note in dialogue.screen.notes if "window" in note]
    assert notes[0] == "the window is full: the oldest turns are left out, 1 by now"
    assert roles(dialogue.messages) == "system" + " user assistant" * 4  # /save has them all
    seen = dialogue.tokenizer.decode(dialogue._fit(dialogue.messages[:-1]))
    assert "Be short." in seen and "Question 3" in seen and "Question 0" not in seen
    dialogue.clear()
    assert (dialogue.forgotten, roles(dialogue.messages)) == (0, "system")


def test_a_message_over_the_window_is_taken_back(dialogue):
    dialogue.say("How many?")
    before = dialogue.messages
    with pytest.raises(UserError, match=r"the message is \d+ tokens .*; the window takes 150; shorten it"):
        dialogue.say("pears " * 200)
    assert (dialogue.messages, dialogue.forgotten) == (before, 0)


def test_a_prompt_width_is_compiled_once(dialogue, compilations):
    for text in ("a", "b", "pears " * 20, "c"):
        dialogue.say(text)
    before, widths = compilations(), set(dialogue.widths)
    dialogue.clear()
    for text in ("d", "e", "pears " * 20, "f"):
        dialogue.say(text)
    assert compilations() == before and dialogue.widths == widths
    assert len(widths) <= 3


def test_ctrl_c_keeps_what_came_so_far(dialogue):
    dialogue.say("How many?")
    whole = dialogue.messages[1]["content"]
    dialogue.clear()
    dialogue.answers, dialogue.screen.interrupt_after = 0, 6
    dialogue.say("How many?")
    kept = dialogue.messages[1]["content"]
    assert whole.startswith(kept.rstrip("\N{REPLACEMENT CHARACTER}")) and len(kept) < len(whole)
    assert dialogue.screen.notes[-1] == "stopped"
    dialogue.say("And now?")
    assert roles(dialogue.messages) == "user assistant user assistant"
    assert dialogue.screen.answer == dialogue.messages[-1]["content"]


def test_ctrl_c_before_the_answer_takes_the_message_back(dialogue, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    dialogue.say("How many?")
    before = dialogue.messages
    with monkeypatch.context() as patch:
        patch.setattr(dialogue.generator, "generate", interrupt)
        dialogue.say("And now?")
        dialogue.retry()
        assert dialogue.messages == before
        assert dialogue.screen.notes[-1] == "stopped before the answer began: nothing is kept of it"
        patch.setattr(dialogue.screen, "interactive", False)
        with pytest.raises(KeyboardInterrupt):
            dialogue.say("And now?")


def test_ctrl_c_waits_for_a_compilation():
    from mindrlhf.cli.dialogue import _interrupts_held_back

    reached = False
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _interrupts_held_back():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached and signal.getsignal(signal.SIGINT) is handler
    with _interrupts_held_back():
        pass


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sav x", "unknown command /sav; did you mean /save?"),
        ("/xyz", "unknown command /xyz; /help lists them"),
        ("/retry", "/retry: there is no answer yet"),
        ("/save", "/save: name a file, for example /save chat.jsonl"),
        ("/save x", "/save: there is no answer yet"),
    ],
)
def test_a_mistake_in_a_pipe_ends_it(chat, monkeypatch, line, message):
    from mindrlhf.cli import dialogue

    monkeypatch.setattr(dialogue.Dialogue, "__init__", lambda self, *_: vars(self).update(messages=[], templated=True))
    assert chat([line]) == (2, "", f"mindrlhf: error: {message}\n")


def test_save_leaves_a_file_alone(chat, tmp_path):
    saved = tmp_path / "mine.jsonl"
    saved.write_text("mine\n")
    code, _, errors = chat(["hello", f"/save {saved}"])
    assert (code, saved.read_text()) == (2, "mine\n")
    assert errors.splitlines()[-1] == f"mindrlhf: error: /save {saved}: exists already; name another file"
    code, _, errors = chat(["hello", f"/save {tmp_path}/nowhere/a.jsonl"])
    assert code == 2 and "No such file or directory; name another file" in errors


def test_mistakes_before_the_first_line(chat, tmp_path):
    for arguments, message in (
        (["sampling.max_tokens=300"], "sampling.max_tokens: 300 leaves no room"),
        (["sampling.top_p=2"], "sampling.top_p: 2.0 must be"),
        (["sampling.stop=[pears and]"], "sampling.stop: 'pears and' is"),
        (["max_prompt_tokens=0"], "max_prompt_tokens: 0 must be 1 or more"),
        (["--model", str(tmp_path / "nowhere")], "no such checkpoint directory"),
    ):
        code, output, errors = chat(["hello"], *arguments)
        assert (code, output, errors.count("\n")) == (2, "", 1) and message in errors


class TerminalSession:
    """The command on a pseudo-terminal."""

    def __init__(self, *arguments, **environment):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "mindrlhf", "chat", *arguments]
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", **environment}
        ends = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(command, **ends, env=environment, start_new_session=True)
        os.close(slave)
        self.seen = ""

    def until(self, text):
        """Everything up to and with this text."""
        end = time.monotonic() + 120
        while text not in self.seen and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other end is closed
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, found, self.seen = self.seen.partition(text)
        assert found, f"{text!r} never came: {before!r}"
        return before + found

    def answer_prompt(self, line, prompt="\n> "):
        """Type only once the prompt is there: before, the terminal and not readline would take it."""
        self.until(prompt)
        os.write(self.master, line.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_on_a_terminal(model):
    session = TerminalSession("--model", str(model), "sampling.max_tokens=150")
    with contextlib.closing(session):
        session.until("106 tokens of history; /help lists the commands, Ctrl-D leaves")
        session.answer_prompt("pears\n")
        session.until("compiling...\r\n")
        session.process.send_signal(signal.SIGINT)
        session.until("stopped")
        session.answer_prompt("/retri\n")
        session.until("unknown command /retri; did you mean /retry?")
        session.answer_prompt("/help\n")
        session.until("/save FILE")
        session.answer_prompt("\x04")  # Ctrl-D
        assert session.process.wait(60) == 0


def test_ctrl_c_at_the_prompt(model):
    session = TerminalSession("--model", str(model), NO_COLOR="")
    with contextlib.closing(session):
        session.until("\x1b[90m128 tokens of history")
        session.answer_prompt("x", "> \x1b[0m")
        session.until("x")
        time.sleep(1)  # readline misses a signal that comes just before it waits for a key
        session.process.send_signal(signal.SIGINT)
        assert session.process.wait(60) == 130
        session.until("mindrlhf: interrupted")
