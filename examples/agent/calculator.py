"""A calculator that the model can call within an answer: `calc(347*28)` is answered by ` 9716` and a new line."""

import re

from mindrlhf.environments import Environment

CALL = re.compile(r"calc\(([0-9]{1,9})\*([0-9]{1,9})\)$")


class Calculator(Environment):
    """A turn that ends with `)` is a call; any other turn is the final answer, which the rewards judge."""

    stop = (")",)

    def step(self, text):
        call = CALL.search(text)
        if call:
            return f" {int(call[1]) * int(call[2])}\n", 0.0, False
        if text.endswith(")"):
            return " error\n", -0.1, False
        return "", 0.0, True
