"""The chat as it is used: the embedded model, driven through stdin and in a terminal."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import reftnoise as rn
from reftnoise.config.decoding import Decoding
from reftnoise.inference.chat import Conversation
from reftnoise.inference.loading import load_adapted, load_library
from support.adapters import QUESTIONS, answer, save_adapter
from support.waiting import PATIENCE

SCRIPT = (
    "import sys; from reftnoise.inference.chat import Decoding, chat\n"
    "chat(sys.argv[1], decoding=Decoding(max_new_tokens=16))"
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="module")
def loaded(adapter: Path) -> tuple[rn.ReftModel, Any]:
    return load_adapted(adapter, device="cpu")


class Talk:
    """A conversation and what it prints."""

    def __init__(self, reft_model: rn.ReftModel, tokenizer: Any, **settings: Any) -> None:
        self.printed = io.StringIO()
        console = Console(file=self.printed, width=60)
        decoding = Decoding(**{"max_new_tokens": 16} | settings)
        self.conversation = Conversation(reft_model, tokenizer, console, decoding=decoding)

    def say(self, line: str) -> str:
        before = len(self.printed.getvalue())
        assert self.conversation.read(line)
        return self.printed.getvalue()[before:].rstrip("\n")


@pytest.fixture
def talk(loaded: tuple[rn.ReftModel, Any]) -> Any:
    yield Talk(*loaded)
    loaded[0].scale = 1.0


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# -- as a program --------------------------------------------------------------------------------


def test_a_script_drives_it_through_stdin(adapter: Path, loaded: tuple[rn.ReftModel, Any]) -> None:
    reft_model, tokenizer = loaded
    first, second = QUESTIONS[:2]
    lines = [first, "", "/off", "/reset", first, "/nosuch", "/on", "/reset", second, "/quit", first]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(adapter)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with reft_model.disabled():
        base = answer(reft_model, tokenizer, [user(first)])
    adapted = [answer(reft_model, tokenizer, [user(one)]) for one in (first, second)]
    assert base != adapted[0]
    assert done.stdout.splitlines() == [
        adapted[0],
        "The base answers, without the adapter, and has not read the conversation.",
        "The conversation starts again.",
        base,
        "unknown command /nosuch; possible: /off, /on, /scale, /reset, /system, /help, /quit",
        "The adapted model answers, and has not read the conversation.",
        "The conversation starts again.",
        adapted[1],
    ]


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self._file, inside = os.openpty()
        self._program = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
        )
        os.close(inside)
        self._printed, self._taken = b"", 0
        self.seen = ""

    def interrupt(self) -> None:
        self._program.send_signal(signal.SIGINT)

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Read what the program prints until a match, which is taken away."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._file], [], [], 0.1)[0]:
                try:
                    self._printed += os.read(self._file, 4096)
                    self.seen = self._printed.decode(errors="ignore")[self._taken :]
                except OSError:  # the program has left
                    assert re.search(pattern, self.seen), self.seen
        self._taken += found.end()
        self.seen = self.seen[found.end() :]

    def leave(self) -> int:
        return self._program.wait(timeout=PATIENCE)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: Any) -> None:
        self._program.kill()
        self._program.wait()
        os.close(self._file)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a system with terminals")
def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(adapter: Path) -> None:
    # An answer that does not end by itself, slow enough to be interrupted; if it is not, it fails.
    slow = (
        "import signal, sys, time\n"
        "from reftnoise.evaluation import generation\n"
        "from reftnoise.inference import chat\n"
        # Tests that a shell runs in the background inherit that this signal is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "put, budget = chat._Printer.put, iter(range(100))\n"
        "def slowly(*arguments): time.sleep(0.3); next(budget); put(*arguments)\n"
        "chat._Printer.put = slowly\n"
        "generation.ends_of = lambda *_: [0]\n"
        "chat.chat(sys.argv[1], decoding=chat.Decoding(max_new_tokens=120))\n"
    )
    with Terminal(sys.executable, "-c", slow, str(adapter)) as terminal:
        drive(terminal)
        assert terminal.leave() == 0


def drive(terminal: Terminal) -> None:
    terminal.wait_for("/help lists commands, Ctrl-D leaves")
    terminal.wait_for("› ")
    terminal.type(f"{QUESTIONS[0]}\r")
    terminal.wait_for(r"live\?\r\n.*\w+ ")  # the answer has begun
    terminal.interrupt()
    terminal.wait_for("› ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    time.sleep(0.5)  # a signal is seen while the program waits for keys
    terminal.interrupt()
    terminal.wait_for("Ctrl-D or /quit leaves")
    terminal.wait_for("› ")
    terminal.type("/scale\r")
    terminal.wait_for("expected a number")
    terminal.wait_for("› ")
    terminal.type("\x04")


# -- the conversation ----------------------------------------------------------------------------


def test_an_answer_sees_all_messages_before_it(
    talk: Talk, loaded: tuple[rn.ReftModel, Any]
) -> None:
    first = talk.say(QUESTIONS[0])
    second = talk.say(QUESTIONS[1])
    messages = [user(QUESTIONS[0]), {"role": "assistant", "content": first}, user(QUESTIONS[1])]
    assert second == answer(*loaded, messages)
    assert talk.conversation.messages == [*messages, {"role": "assistant", "content": second}]


def test_the_base_does_not_read_what_the_adapted_model_wrote(
    talk: Talk, loaded: tuple[rn.ReftModel, Any]
) -> None:
    reft_model, tokenizer = loaded
    assert talk.say("/off") == "The base answers, without the adapter."
    assert talk.say("/on") == "The adapted model answers."
    first = talk.say(QUESTIONS[0])
    assert talk.say("/off").endswith("without the adapter, and has not read the conversation.")
    of_base = talk.say(QUESTIONS[1])
    with reft_model.disabled():
        assert of_base == answer(reft_model, tokenizer, [user(QUESTIONS[1])])
    assert talk.say("/on") == "The adapted model answers, from where it stopped."
    messages = [user(QUESTIONS[0]), {"role": "assistant", "content": first}, user(QUESTIONS[2])]
    assert talk.say(QUESTIONS[2]) == answer(reft_model, tokenizer, messages)
    talk.say("/reset")
    assert talk.conversation.messages == []
    talk.say("/off")
    assert talk.conversation.messages == []


def test_edits_are_scaled(talk: Talk, loaded: tuple[rn.ReftModel, Any]) -> None:
    reft_model, tokenizer = loaded
    answers = {}
    for scale in ("0", "0.5", "1"):
        assert talk.say(f"/scale {scale}") == f"Edits are multiplied by {scale}."
        answers[scale] = talk.say(QUESTIONS[0])
        with reft_model.using(scale=float(scale)):
            assert answers[scale] == answer(reft_model, tokenizer, [user(QUESTIONS[0])])
        talk.say("/reset")
    with reft_model.disabled():
        assert answers["0"] == answer(reft_model, tokenizer, [user(QUESTIONS[0])])
    assert len(set(answers.values())) > 1
    assert talk.say("/scale much").startswith("/scale much: expected a number such as 0.5;")
    assert reft_model.scale == 1.0


def test_a_system_message(talk: Talk, loaded: tuple[rn.ReftModel, Any]) -> None:
    system = {"role": "system", "content": "Answer in emoji."}
    assert talk.say("/system Answer in emoji.") == "The system message is set."
    assert talk.say(QUESTIONS[0]) == answer(*loaded, [system, user(QUESTIONS[0])])
    assert talk.say("/system") == "There is no system message now."
    talk.say("/reset")
    assert talk.say(QUESTIONS[0]) == answer(*loaded, [user(QUESTIONS[0])])


@pytest.mark.parametrize(
    ("typed", "meant"), [("/rest", "/reset"), ("/quti", "/quit"), ("/HELP", "/help")]
)
def test_an_unknown_command_names_the_nearest(typed: str, meant: str, talk: Talk) -> None:
    assert talk.say(f"{typed} it").startswith(f"unknown command {typed}; did you mean '{meant}'?")
    assert not talk.conversation.messages


def test_help_lists_all_commands(talk: Talk) -> None:
    names = [line.split()[0] for line in talk.say("/help").splitlines()]
    assert names == ["/off", "/on", "/scale", "/reset", "/system", "/help", "/quit"]


def test_markup_is_shown_as_it_is(talk: Talk) -> None:
    assert "unknown command /[bold]x;" in talk.say("/[bold]x")


def test_old_messages_are_forgotten_where_they_do_not_fit(
    talk: Talk, loaded: tuple[rn.ReftModel, Any]
) -> None:
    long = "Where does a bear live? " * 12
    talk.say(long)
    talk.say(long)
    printed = talk.say(long).splitlines()
    assert printed[0] == "The 2 oldest messages no longer fit into 256 tokens."
    messages = talk.conversation.messages
    assert len(messages) == 4
    assert "\n".join(printed[1:]) == answer(*loaded, messages[:3])
    assert "kept for the answer" in talk.say(long * 4)
    assert talk.conversation.messages == messages


def test_without_a_chat_template_texts_are_continued(loaded: tuple[rn.ReftModel, Any]) -> None:
    reft_model, _ = loaded
    tokenizer = rn.load_tiny_model()[1]
    tokenizer.chat_template = None
    talk = Talk(reft_model, tokenizer)
    assert talk.printed.getvalue().count("no chat template") == 1
    texts = [QUESTIONS[0]]
    for line in QUESTIONS[:2]:
        if line != texts[0]:
            texts.append(line)
        prompt = tokenizer("\n".join(texts), return_tensors="pt")
        tokens = reft_model.generate(**prompt, max_new_tokens=16, do_sample=False)
        written = tokens[0, prompt["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(written, skip_special_tokens=True))
        assert talk.say(line) == texts[-1].rstrip("\n")
    assert talk.printed.getvalue().count("no chat template") == 1


def test_a_template_without_system_messages(loaded: tuple[rn.ReftModel, Any]) -> None:
    reft_model, _ = loaded
    tokenizer = rn.load_tiny_model()[1]
    refusal = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    tokenizer.chat_template = refusal + tokenizer.chat_template
    talk = Talk(reft_model, tokenizer, system="Be brief.")
    assert talk.say(QUESTIONS[0]) == "not answered: chat template: no system"
    assert not talk.conversation.messages
    talk.say("/system")
    assert talk.say(QUESTIONS[0]) == answer(reft_model, tokenizer, [user(QUESTIONS[0])])


# -- loading -------------------------------------------------------------------------------------


def test_a_run_says_its_base(adapter: Path) -> None:
    recipe = adapter.parent / "recipe.yaml"
    recipe.write_text("model: tiny-chat\ndtype: bfloat16\n", encoding="utf-8")
    try:
        assert str(load_adapted(adapter.parent, device="cpu")[0].dtype) == "torch.bfloat16"
        assert str(load_adapted(adapter, dtype="float32", device="cpu")[0].dtype) == "torch.float32"
    finally:
        recipe.unlink()


def test_a_base_that_is_not_to_be_had(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^someone/nothing, the adapter's base: .+") as caught:
        load_adapted(adapter, "someone/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no reft_config\.json in it"):
        load_adapted(tmp_path)
    path = save_adapter(tmp_path / "other") / "reft_config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    description["base_model"]["name_or_path"] = ""
    path.write_text(json.dumps(description), encoding="utf-8")
    for load in (load_adapted, lambda directory: load_library({"emoji": directory})):
        with pytest.raises(ValueError, match="the adapter's base has no name: expected `model`"):
            load(path.parent)
