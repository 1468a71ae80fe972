"""What ``kvbits score`` does: read data, load the model, run, keep and return the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbits.cli.models import load_config, load_model
from kvbits.cli.output import progress_bars
from kvbits.evaluation.benchmarks import Benchmark
from kvbits.evaluation.benchmarks.execution import DockerExecutor
from kvbits.evaluation.benchmarks.running import RunSettings, make_items, make_prompter
from kvbits.evaluation.benchmarks.scored import scored
from kvbits.evaluation.benchmarks.source import open_source

if TYPE_CHECKING:
    from kvbits.plan import CachePlan


class Scoring:
    """One run of a benchmark.

    Args:
        benchmark: The benchmark.
        settings: How it is run.
        data: Folder with data files; None is the hub.
        output: Folder for what is found; None keeps nothing.
        execute_in: ``docker:IMAGE`` to run programs in, if they are to be run.

    Raises:
        ValueError: If a benchmark that only writes has nowhere to write, or programs cannot be
            run.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        settings: RunSettings,
        data: Path | None,
        output: Path | None,
        execute_in: str | None,
    ) -> None:
        if execute_in is not None and not benchmark.has_programs:
            raise ValueError(
                f"--execute-in must be given for a benchmark whose answers are programs that "
                f"kvbits can test, got {benchmark.name}"
            )
        if benchmark.only_writes and output is None and execute_in is None:
            raise ValueError(
                f"--output must be given for {benchmark.name}, whose answers are written and not "
                "run here"
            )
        self.execute = None if execute_in is None else DockerExecutor(execute_in)
        if self.execute is not None:
            self.execute.check()
        self.benchmark, self.settings, self.output = benchmark, settings, output
        self.source, self.execute_in = open_source(data), execute_in
        examples = benchmark.example_files if settings.shots else ()
        self.source.check([*benchmark.files, *examples])  # before weights are loaded

    def run(
        self,
        model: str,
        choose: Callable[[Any], CachePlan | None],
        device: str,
        dtype: str,
    ) -> dict[str, Any]:
        """Run it, or read what the same run found before.

        Args:
            model: Folder or hub id.
            choose: Makes the plan from the model's config.
            device: As for ``load_model``.
            dtype: As for ``load_model``.
        """
        plan = choose(load_config(model))
        loaded = load_model(model, device, dtype)
        make_prompter(loaded.model, loaded.tokenizer, self.settings)  # refuses before data is read
        items = make_items(self.benchmark, self.source, loaded.tokenizer, self.settings)
        with progress_bars() as bars:
            bar = bars.add_task(self.benchmark.name, total=len(items))
            return scored(
                self.benchmark,
                items,
                loaded.model,
                loaded.tokenizer,
                plan,
                self.settings,
                self.source,
                facts={"model": Path(loaded.name).name, "execute_in": self.execute_in},
                folder=self.output,
                execute=self.execute,
                progress=lambda count: bars.advance(bar, count),
            )
