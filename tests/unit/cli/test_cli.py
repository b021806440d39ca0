"""The command line: quick to answer, thin, and a dry run that leaves no trace of work."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from dreambooth import __version__
from dreambooth.config.explain import list_settings
from dreambooth.config.settings import DreamBoothConfig, load_config
from pipelines.cli import main


@pytest.fixture
def dry_run(tiny_pipeline: Path, tmp_path: Path, mlflow_database: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`dreambooth run ... --dry-run` on a machine of eight CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_database)

    def invoke(*arguments: str | Path, base: str | Path = tiny_pipeline) -> Result:
        output = ("--set", f"storage.root={tmp_path / 'output'}", "--base-model", str(base))
        result = CliRunner().invoke(main, ["run", *output, *map(str, arguments), "--dry-run"])
        assert result.exit_code == 0, result.output
        return result

    return invoke


@pytest.fixture
def config_of(dry_run: Callable[..., Result]) -> Callable[..., DreamBoothConfig]:
    """The settings of `dreambooth run ...`, by what a dry run prints: a configuration in itself."""
    return lambda *arguments: load_config(yaml.safe_load(dry_run(*arguments, "--verbose", "--quiet").stdout))


class TestStart:
    @pytest.mark.parametrize("command", [[], ["run"], ["generate"], ["identifiers"], ["settings"]])
    def test_help_takes_less_than_a_second_in_a_fresh_process(self, command: list[str]) -> None:
        import resource

        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        code = "from pipelines.cli import main; main(prog_name='dreambooth')"
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=True
        )
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        assert done.stdout.startswith("Usage: dreambooth")
        assert done.stderr == ""
        assert seconds < 1  # of computing, whatever else the machine does; a machine at rest takes a fifth of it

    def test_the_version(self) -> None:
        assert __version__ in CliRunner().invoke(main, ["--version"]).output

    @pytest.mark.parametrize("group", [[], ["jobs"]])
    def test_every_summary_is_whole_at_80_columns(self, group: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        _, _, commands = CliRunner().invoke(main, [*group, "--help"]).stdout.partition("\nCommands:\n")
        assert len(commands.splitlines()) >= 4
        assert all(len(line) <= 80 and line.endswith(".") and "..." not in line for line in commands.splitlines())

    def test_every_option_has_a_sentence_of_its_own(self) -> None:
        def options(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
            for option in command.params:
                if isinstance(option, click.Option):
                    yield f"{name} {option.opts[0]}", option.help or ""
            for below, inner in getattr(command, "commands", {}).items():
                yield from options(inner, f"{name} {below}")

        found = dict(options(main, "dreambooth"))
        assert len(found) > 100
        assert [name for name, text in found.items() if len(text.split()) < 2 or not text.endswith(".")] == []
        fragments = re.compile(r"(Of|That|As in|Most|Least|Only) ")
        assert [name for name, text in found.items() if fragments.match(text)] == []

    def test_what_a_bug_report_needs(self) -> None:
        result = CliRunner().invoke(main, ["version"])
        rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
        assert rows["dreambooth"].startswith(__version__)
        assert rows["python"] == platform.python_version()
        assert rows["torch"] == version("torch")
        assert {"system", "processor", "memory", "GPUs", "CUDA", "ray", "deepspeed", "mlflow"} <= set(rows)

    def test_an_unknown_command(self) -> None:
        assert CliRunner().invoke(main, ["fly"]).exit_code == 2


class TestDryRun:
    def test_it_prints_the_plan_and_with_verbose_the_configuration_after_it(
        self, dry_run: Callable[..., Result], instance_folder: Path, tiny_pipeline: Path
    ) -> None:
        arguments = ("--images", instance_folder, "--class-noun", "dog", "--workers", "2", "--zero-stage", "3")
        result = dry_run(*arguments, "--verbose")
        assert result.output.index("writes to") < result.output.index("max_train_steps:")
        config = load_config(yaml.safe_load(result.stdout))
        assert config.subject.name == "red-dog"
        assert config.subject.identifier is not None
        assert (config.cluster.num_workers, config.zero.stage, config.images.resolution) == (2, 3, 64)
        for words in (
            "red-dog: 5 images of a dog",
            f"a photo of {config.subject.identifier} dog",
            str(tiny_pipeline),
            "DeepSpeed ZeRO-3",
            "200 of 'a photo of a dog': 200 to make",
            "1000 of 2 instance/class pairs",
            "output/red-dog",
        ):
            assert words in result.stderr, words
        assert re.search(r"(?m)^time +not known before a first result of this base model", result.stderr), result.stderr

    def test_without_verbose_no_configuration(self, dry_run: Callable[..., Result], instance_folder: Path) -> None:
        assert dry_run("--images", instance_folder, "--class-noun", "dog", "--quiet").stdout == ""

    def test_it_writes_no_output(
        self, dry_run: Callable[..., Result], instance_folder: Path, tmp_path: Path, working_folder: Path
    ) -> None:
        import ray

        dry_run("--images", instance_folder, "--class-noun", "dog", "--workers", "2")
        assert [path for path in (tmp_path / "output").rglob("*") if path.is_file()] == []
        assert list(working_folder.iterdir()) == []
        assert not ray.is_initialized()

    def test_what_it_prints_is_the_same_run_again(
        self, dry_run: Callable[..., Result], instance_folder: Path, working_folder: Path
    ) -> None:
        printed = ("--verbose", "--quiet")
        first = dry_run("--images", instance_folder, "--class-noun", "dog", "--steps", "7", *printed)
        (working_folder / "again.yaml").write_text(first.stdout)
        assert dry_run("again.yaml", *printed).stdout == first.stdout

    def test_quiet(self, dry_run: Callable[..., Result], instance_folder: Path) -> None:
        encoder = ("--set", "evaluation.image_encoder=miniature")
        assert dry_run("--images", instance_folder, "--class-noun", "dog", "--quiet", *encoder).stderr == ""

    def test_a_missing_image_encoder_is_a_warning_as_in_the_run(
        self, dry_run: Callable[..., Result], instance_folder: Path
    ) -> None:
        result = dry_run("--images", instance_folder, "--class-noun", "dog", "--quiet")
        assert result.stderr.startswith("warning: similarities will not be measured")

    def test_warnings_are_shown_even_then(self, dry_run: Callable[..., Result], instance_folder: Path) -> None:
        result = dry_run("--images", instance_folder / "00.png", "--name", "rex", "--class-noun", "dog", "--quiet")
        assert "\nwarning: 1 instance image;" in result.stderr


class TestSettings:
    def test_flags_go_over_the_file_and_set_over_flags(
        self, config_of: Callable[..., DreamBoothConfig], instance_folder: Path, working_folder: Path
    ) -> None:
        (working_folder / "run.yaml").write_text(
            f"subject: {{name: rex, class_noun: dog, instance_images: {instance_folder}}}\n"
            "train: {max_train_steps: 5, learning_rate: 0.001, seed: 3}\n"
        )
        arguments = ("--steps", "6", "--class-noun", "cat", "--set", "train.max_train_steps=7", "--identifier", "tfz")
        config = config_of("run.yaml", *arguments)
        assert (config.train.max_train_steps, config.train.learning_rate, config.train.seed) == (7, 0.001, 3)
        assert (config.subject.name, config.subject.class_noun, config.subject.identifier) == ("rex", "cat", "tfz")

    @pytest.mark.parametrize(
        ("folder", "pattern", "name"),
        [
            ("My Dog", "", "my-dog"),
            ("rex", "/", "rex"),
            ("Rex_2024", "/*.png", "rex-2024"),
            ("--rex--", "", "rex"),
            ("a" * 80, "", "a" * 63),
        ],
    )
    def test_the_name_comes_from_the_folder(
        self,
        config_of: Callable[..., DreamBoothConfig],
        instance_folder: Path,
        working_folder: Path,
        folder: str,
        pattern: str,
        name: str,
    ) -> None:
        (working_folder / folder).symlink_to(instance_folder)
        config = config_of("--images", f"{working_folder}/{folder}{pattern}", "--class-noun", "dog")
        assert config.subject.name == name

    def test_a_subjects_own_file_says_what_it_is(self, config_of: Callable[..., DreamBoothConfig]) -> None:
        from dreambooth.miniature import subject_dir

        config = config_of("--images", subject_dir("coral-car"))
        assert (config.subject.name, config.subject.class_noun) == ("coral-car", "car")
        config = config_of("--images", subject_dir("coral-car"), "--name", "rex", "--class-noun", "dog")
        assert (config.subject.name, config.subject.class_noun) == ("rex", "dog")

    def test_all_are_listed(self) -> None:
        result = CliRunner().invoke(main, ["settings"])
        assert result.exit_code == 0
        listed = {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
        assert {name for name, _, _ in list_settings(DreamBoothConfig)} <= listed
        assert "train.text_encoder_learning_rate" in listed
        assert "prompts.class" in listed

    def test_a_line_is_as_wide_as_the_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        lines = CliRunner().invoke(main, ["settings"]).stdout.splitlines()
        assert max(map(len, lines)) <= 80

    @pytest.mark.parametrize(
        ("section", "names"),
        [
            (
                "zero",
                [
                    *("zero.stage", "zero.offload_optimizer", "zero.offload_parameters"),
                    *("zero.weights", "zero.gather_blocks"),
                ],
            ),
            ("base_model", ["base_model"]),
            ("train.seed", ["train.seed"]),
        ],
    )
    def test_a_section_alone(self, section: str, names: list[str]) -> None:
        lines = CliRunner().invoke(main, ["settings", section]).stdout.splitlines()
        assert [line.split(" = ")[0] for line in lines if not line.startswith(" ")] == names

    def test_what_the_miniature_has_instead(self) -> None:
        shown = CliRunner().invoke(main, ["settings", "train"]).stdout
        assert "train.micro_batch_size = 1 (miniature, miniature-flow, miniature-cascade: 2)\n" in shown
        assert "train.max_train_steps = 1000 (miniature: 400; miniature-flow, miniature-cascade:\n        200" in shown
        assert "train.min_snr_gamma = null (miniature: 5.0)\n" in shown

    def test_no_such_section(self) -> None:
        result = CliRunner().invoke(main, ["settings", "trian"])
        assert result.exit_code == 2
        assert "no setting or section is named 'trian'; did you mean train? The sections are subject," in result.stderr

    def test_values_are_written_as_in_yaml(self) -> None:
        shown = CliRunner().invoke(main, ["settings"]).stdout
        assert "subject.identifier = null\n" in shown
        assert "images.flip = false\n" in shown
        assert not re.search(r"\b(None|True|False)\b", shown)

    def test_each_says_what_it_means(self) -> None:
        assert [name for name, _, description in list_settings(DreamBoothConfig) if not description] == []

    def test_the_page_is_the_one_in_docs(self) -> None:
        result = CliRunner().invoke(main, ["settings", "--markdown"])
        page = Path(__file__).parents[3] / "docs" / "settings.md"
        assert result.stdout == page.read_text(), "run: dreambooth settings --markdown > docs/settings.md"
        assert all(f"| `{name}` |" in result.stdout for name, _, _ in list_settings(DreamBoothConfig))


class TestIdentifiers:
    def invoke(self, *arguments: str | Path) -> list[str]:
        result = CliRunner().invoke(main, ["identifiers", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    def test_rare_tokens_with_the_reason(self, tiny_pipeline: Path) -> None:
        lines = self.invoke("--base-model", tiny_pipeline, "--limit", "7")
        assert len(lines) == 7
        words = [line.split()[0] for line in lines]
        assert len(set(words)) == 7
        assert all(2 <= len(word) <= 3 for word in words)
        assert all("one token, among the rarest" in line for line in lines)

    def test_of_the_miniature_if_nothing_is_said(self) -> None:
        assert len(self.invoke()) == 20

    def test_one_of_ones_own(self, tiny_pipeline: Path) -> None:
        rare = self.invoke("--base-model", tiny_pipeline, "--limit", "1")[0].split()[0]
        assert self.invoke("--base-model", tiny_pipeline, "--check", rare) == [f"{rare!r} is a rare identifier"]
        (line,) = self.invoke("--base-model", tiny_pipeline, "--check", "beach")
        assert "with a meaning for the base model" in line
