"""One line in the terminal that says how a run is doing."""

import sys
import time

from mindrlhf.utils.parallel import is_main

SHOWN = (  # metric, how it is shown; in this order
    ("warmup/loss", "loss {:.3f}"),
    ("reward/total", "reward {:.3f}"),
    ("kl", "KL {:.4f}"),
    ("eval/accuracy", "accuracy {:.1%}"),
    ("tokens_per_second", "{:.0f} tokens/s"),
)
COLUMNS = 109  # widest line


class Progress:
    """A bar on a terminal; elsewhere a plain line about every tenth of the steps, so that a log file stays readable.

    A context manager.
    """

    def __init__(self, total: int, initial: int = 0, description: str = "", enabled: bool = True):
        """total: steps of the whole run; initial: steps done before this process."""
        self.total, self.initial, self.done, self.description = total, initial, initial, description
        self.enabled = enabled and is_main()
        self.start = time.monotonic()
        self.latest: dict[str, float] = {}
        self.bar = None
        if self.enabled and sys.stderr.isatty():
            import shutil

            from tqdm import tqdm

            self.bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                ncols=min(COLUMNS, shutil.get_terminal_size().columns),
                bar_format="{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}, {remaining} left",
                smoothing=0.1,
                mininterval=0.2,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step_metrics: dict[str, float]) -> None:
        """One step is done. What a step does not measure, like the accuracy, keeps its last value."""
        self.done += 1
        self.latest.update({name: step_metrics[name] for name, _ in SHOWN if step_metrics.get(name) is not None})
        text = ", ".join(shape.format(self.latest[name]) for name, shape in SHOWN if name in self.latest)
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(1)
        elif self.enabled and self._tenth(self.done) > self._tenth(self.done - 1):
            print(self._line(text), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """A line on standard output, above the bar; printed even where the bar is off."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _tenth(self, steps: int) -> int:
        return 10 * steps // max(self.total, 1)

    def _line(self, text: str) -> str:
        elapsed = time.monotonic() - self.start
        left = round(elapsed / (self.done - self.initial) * max(self.total - self.done, 0))
        hours = f"{left // 3600}:" if left >= 3600 else ""
        clock = f"{hours}{left // 60 % 60:02d}:{left % 60:02d}"
        parts = [f"{self.description} {self.done}/{self.total}".strip(), text, f"{clock} left"]
        return ", ".join(part for part in parts if part)[:COLUMNS]
