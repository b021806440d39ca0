"""The paper's experiments: what is run, what the tables make of evaluations, and what the page says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner
from PIL import Image

from dreambooth.config.settings import load_config
from dreambooth.data.identifier import describe
from dreambooth.errors import InputError
from dreambooth.evaluation.bootstrap import Interval, bootstrap_mean
from dreambooth.evaluation.figures import FIGURE_NAMES, BankId, Figure, Figures
from dreambooth.miniature import subject_names
from dreambooth.models.base_model import resolve_base_model
from pipelines.apps.paper.experiments import DREAMBOOTH, EXPERIMENTS, FLOW, SUPER_RESOLUTION, TABLE_1, TABLE_3, TABLE_5
from pipelines.apps.paper.markdown import render_markdown
from pipelines.apps.paper.page import render_page
from pipelines.apps.paper.paper import describe_paper, plan_paper
from pipelines.apps.paper.rows import Claim, Experiment, Row
from pipelines.apps.paper.settings import full_setting, quick_setting, with_tables
from pipelines.apps.paper.sheets import Sheet
from pipelines.apps.paper.tables import Finding, Table, as_records, make_tables
from pipelines.apps.paper.trials import Trial, distinct_plans, plan_trials, trial_config
from pipelines.cli import main
from pipelines.cluster.ray_cluster import Resources
from pipelines.plan.result_key import result_key
from pipelines.plan.run_plan import make_plan

RESOURCES = Resources(cpus=2, gpus=0)
SUBJECT = {"name": "rex", "class_noun": "car", "instance_images": ["0.png"]}
BANK = BankId(name="miniature", hash="0123456789abcdef")


def evaluation(bank: BankId = BANK, **values: Sequence[float]) -> dict[str, Any]:
    """What evaluation.json holds, with these values of figures, by prompt or by image."""
    figures = {
        name: Figure(bank=bank, interval=bootstrap_mean([numbers]), values=tuple(numbers))
        for name, numbers in values.items()
    }
    return Figures(bank=bank, figures=figures, per_prompt=(), nearest=(), warnings=(), unmeasured={}).as_dict()


def trials_of(experiment: Experiment, keys: Mapping[str, str]) -> list[Trial]:
    """Trials of an experiment for subjects a and b; `keys` names the plan of a row by its slug."""
    return [
        Trial(
            experiment=experiment,
            row=row,
            subject=subject,
            plan=cast("Any", SimpleNamespace(key=f"{keys.get(row.slug, row.slug)}-{subject}")),
        )
        for row in experiment.rows
        for subject in ("a", "b")
    ]


@pytest.fixture
def table_1() -> Table:
    """Real images at 0.9, the cascade at 0.7, the latent model at 0.6 and Textual Inversion at 0.2 in DINO.

    Each give or take 0.05; the flow model is not measured.
    """
    ends = (-0.05, 0.05)
    evaluations = {
        f"{slug}-{subject}": evaluation(
            dino=[dino + end for end in ends],
            clip_i=[0.8, 0.9],
            clip_t_no_identifier=[0.3, 0.2],
            real_dino=[0.85, 0.9, 0.95],
            real_clip_i=[0.95, 0.95, 0.95],
        )
        for slug, dino in (("cascade", 0.7), ("dreambooth", 0.6), ("textual-inversion", 0.2))
        for subject in ("a", "b")
    }
    [table], _ = make_tables(trials_of(TABLE_1, {"real": "dreambooth"}), evaluations)
    return table


class TestExperiments:
    def test_every_claim_is_about_rows_and_a_column_of_its_table(self) -> None:
        for experiment in EXPERIMENTS:
            slugs = [row.slug for row in experiment.rows]
            assert len(set(slugs)) == len(slugs)
            for claim in experiment.claims:
                assert {claim.higher, claim.lower} <= set(slugs), claim
                assert claim.column in experiment.columns, claim

    def test_columns_are_figures_of_an_evaluation(self) -> None:
        for experiment in EXPERIMENTS:
            reads = {name for row in experiment.rows for name in row.reads.values() if name}
            assert {*experiment.columns, *reads} <= set(FIGURE_NAMES)

    def test_the_papers_own_figures_fill_their_columns_and_name_their_source(self) -> None:
        for experiment in EXPERIMENTS:
            assert bool(experiment.published) == bool(experiment.source)
            assert {len(row.figures) for row in experiment.published} <= {len(experiment.published_columns)}

    def test_quick_asserts_what_the_paper_found(self) -> None:
        claims = [claim for experiment in quick_setting().experiments for claim in experiment.claims]
        assert len(claims) == 13
        for experiment in quick_setting().experiments:
            slugs = {row.slug for row in experiment.rows}
            assert all({claim.higher, claim.lower} <= slugs for claim in experiment.claims)


class TestTrials:
    def test_settings_of_a_row_go_over_the_common_ones_and_those_asked_for_over_both(self) -> None:
        setting = replace(quick_setting(), common={"miniature": {"train.max_train_steps": 50, "train.seed": 7}})
        row = Row(slug="x", title="x", settings={"train.max_train_steps": 60})
        config = trial_config(setting, TABLE_1, row, "coral-car", "out", ("train.seed=8",))
        assert (config.train.max_train_steps, config.train.seed) == (60, 8)
        assert config.subject.name == "table1-x-coral-car"
        assert not config.tracking.register_model

    def test_samples_are_compared_with_all_pictures_however_few_are_trained_on(self) -> None:
        config = trial_config(quick_setting(), TABLE_5, TABLE_5.rows[0], "coral-car", "out")
        assert len(config.subject.instance_images) == 1
        assert config.evaluation.real_images is not None
        assert len(config.evaluation.real_images) == 5

    def test_a_wrong_noun_is_another_subjects(self) -> None:
        setting = full_setting()
        wrong = Row(slug="wrong", title="wrong", class_noun="wrong")
        for subject in setting.subjects:
            right = trial_config(setting, TABLE_1, TABLE_3.rows[0], subject, "out").subject
            other = trial_config(setting, TABLE_1, wrong, subject, "out").subject
            assert other.class_noun != right.class_noun
            assert other.identifier == right.identifier

    def test_the_same_settings_are_trained_once(self) -> None:
        trials = plan_trials(quick_setting(), "out", (), RESOURCES)
        plans = distinct_plans(trials)
        names = {plan.config.subject.name for plan in plans}
        assert len(trials) == 30
        assert len(plans) == len(names) == 20
        keys = {(trial.experiment.name, trial.row.slug, trial.subject): trial.plan.key for trial in trials}
        for same in (("table1", "real"), ("table3", "prior"), ("table4", "correct"), ("table5", "images-5")):
            assert keys[*same, "magenta-cat"] == keys["table1", "dreambooth", "magenta-cat"]
        assert "table1-dreambooth-magenta-cat" in names
        assert keys["super-resolution", "little-noise", "magenta-cat"] == keys["table1", "cascade", "magenta-cat"]

    def test_rows_of_other_base_models_have_their_own_defaults_prompts_and_judge(self) -> None:
        base = load_config({"base_model": "miniature-flow", "subject": SUBJECT})
        setting = quick_setting()
        flow, latent = (trial_config(setting, TABLE_1, row, "coral-car", "out") for row in (FLOW, DREAMBOOTH))
        assert flow.train.max_train_steps == base.train.max_train_steps
        assert flow.prior.num_class_images == base.prior.num_class_images
        assert (latent.train.max_train_steps, latent.prior.num_class_images) == (200, 50)
        assert flow.evaluation.num_inference_steps == base.evaluation.num_inference_steps
        assert flow.subject.identifier == latent.subject.identifier
        tasks = [make_plan(one, RESOURCES).protocol for one in (flow, latent)]
        assert tasks[0] is not None
        assert tasks[1] is not None
        assert tasks[0].bank == tasks[1].bank
        assert tasks[0].protocol.prompts_key == tasks[1].protocol.prompts_key

    def test_the_identifier_is_one_token_to_every_base_model(self) -> None:
        for row in TABLE_1.rows:
            base = resolve_base_model(row.base_model)
            for subject in subject_names():
                config = trial_config(quick_setting(), TABLE_1, row, subject, "out")
                described = describe(base.tokenizer, str(config.subject.identifier))
                assert (len(described.tokens), described.is_rare) == (1, True), (row.base_model, subject)

    def test_rows_of_the_super_resolution_differ_in_that_stage_alone(self) -> None:
        plans = [
            make_plan(trial_config(quick_setting(), SUPER_RESOLUTION, row, "coral-car", "out"), RESOURCES)
            for row in SUPER_RESOLUTION.rows
        ]
        firsts = [
            result_key(one.config, one.base, one.data_hash, one.prior, one.engine, use_gpu=False) for one in plans
        ]
        assert len(set(firsts)) == 1
        seconds = [one.second for one in plans if one.second is not None]
        assert [one.config.train.max_train_steps for one in seconds] == [150, 150, 0]
        assert [one.config.super_resolution.noise_levels for one in seconds] == [None, 400, None]
        sampled = [one.protocol for one in plans if one.protocol is not None]
        assert len({one.base_sets for one in sampled}) == 1
        assert len({one.fine_tuned_sets[0].seeds for one in sampled}) == 1
        assert len({one.key for one in sampled}) == 3

    def test_some_tables_alone_are_of_the_same_runs(self, tmp_path: Path) -> None:
        trials = plan_paper(with_tables(quick_setting(), ["super-resolution"]), str(tmp_path), (), RESOURCES).trials
        names = [plan.config.subject.name for plan in distinct_plans(trials)]
        assert {trial.experiment.name for trial in trials} == {"super-resolution"}
        assert names[0] == "table1-cascade-coral-car"
        assert len(names) == 6
        assert with_tables(quick_setting(), ()) == quick_setting()
        result = CliRunner().invoke(main, ["paper", "--quick", "--table", "table2"])
        assert result.exit_code == 2
        assert "--table table2: the quick setting has the tables table1, table3, table4, table5" in result.stderr


class TestTables:
    def test_a_row_is_the_mean_over_subjects_and_prompts(self, table_1: Table) -> None:
        cell = table_1.cells["dreambooth", "dino"]
        assert cell is not None
        assert cell.mean == pytest.approx(0.6)
        assert cell.low < 0.6 < cell.high

    def test_real_images_are_among_themselves_and_have_no_prompt(self, table_1: Table) -> None:
        dino = table_1.cells["real", "dino"]
        assert dino is not None
        assert dino.mean == pytest.approx(0.9)
        assert table_1.cells["real", "clip_t_no_identifier"] is None

    def test_findings(self, table_1: Table) -> None:
        real, inversion, cascade = table_1.findings
        assert real.difference is not None
        assert real.difference.mean == pytest.approx(0.3)
        assert [finding.verdict for finding in table_1.findings] == ["came out"] * 3
        assert "+0.400 (+0.400 to +0.400)" in inversion.sentence
        assert "+0.100 (+0.100 to +0.100)" in cascade.sentence

    def test_records(self, table_1: Table) -> None:
        records = as_records([table_1])
        assert {"table", "row", "column", "mean", "low", "high", "n"} == set(records[0])
        assert len(records) == 11
        assert {record["row"] for record in records} == {
            "Real images",
            "DreamBooth (miniature-cascade)",
            "DreamBooth (miniature)",
            "Textual Inversion (miniature)",
        }

    def test_a_base_model_that_is_not_measured_has_an_empty_row(self, table_1: Table) -> None:
        assert {table_1.cells["flow", name] for name in TABLE_1.columns} == {None}
        assert "| DreamBooth (miniature-flow) | – | – | – |" in render_markdown([table_1], [])
        assert "DreamBooth (miniature-flow)" in render_page([table_1], [], {})

    def test_only_subjects_that_both_rows_have_are_compared(self) -> None:
        evaluations = {
            "prior-a": evaluation(pres=[0.1, 0.2], div=[0.5], dino=[0.5], clip_i=[0.5], clip_t_no_identifier=[0.1]),
            "prior-b": evaluation(pres=[0.9, 0.9], div=[0.5], dino=[0.5], clip_i=[0.5], clip_t_no_identifier=[0.1]),
            "no-prior-a": evaluation(pres=[0.3, 0.4], div=[0.6], dino=[0.5], clip_i=[0.5], clip_t_no_identifier=[0.1]),
        }
        [table], _ = make_tables(trials_of(TABLE_3, {}), evaluations)
        lowers, raises = table.findings
        assert lowers.difference is not None
        assert lowers.difference.mean == pytest.approx(0.2)
        assert lowers.verdict == "came out"
        assert raises.verdict == "undecided"  # one value, of which nothing more is known
        assert raises.sentence.endswith("the difference in DIV is -0.100.")
        assert table.subjects == {"prior": ("a", "b"), "no-prior": ("a",)}

    def test_without_a_row_nothing_is_said(self) -> None:
        measured = evaluation(pres=[0.1], div=[0.5], dino=[0.5], clip_i=[0.5], clip_t_no_identifier=[0.1])
        [table], _ = make_tables(trials_of(TABLE_3, {}), {"prior-a": measured})
        assert [finding.verdict for finding in table.findings] == ["not measured", "not measured"]
        assert table.cells["no-prior", "pres"] is None

    @pytest.mark.parametrize(
        ("low", "high", "verdict"), [(0.1, 0.2, "came out"), (-0.1, 0.2, "undecided"), (-0.2, -0.1, "did not come out")]
    )
    def test_verdicts_go_by_the_interval(self, low: float, high: float, verdict: str) -> None:
        claim = Claim(sentence="One is above two in DINO", column="dino", higher="one", lower="two")
        finding = Finding(claim=claim, difference=Interval(mean=(low + high) / 2, low=low, high=high, n=9))
        assert finding.verdict == verdict
        assert verdict in finding.sentence

    def test_figures_of_two_banks_never_meet(self) -> None:
        other = replace(BANK, name="paper")
        evaluations = {"prior-a": evaluation(dino=[0.5]), "prior-b": evaluation(other, dino=[0.5])}
        with pytest.raises(InputError, match="one bank"):
            make_tables(trials_of(TABLE_3, {}), evaluations)


class TestPage:
    def test_it_has_our_figures_with_intervals_and_the_papers_marked(self, table_1: Table) -> None:
        sheet = Sheet(image=Image.new("RGB", (64, 64)), prompts=("a photo of a dog",))
        html = render_page([table_1], [("setting", "quick <b>")], {table_1.experiment.name: sheet})
        assert "0.600<small>" in html
        assert "0.668" in html
        assert "Not comparable" in html
        assert "quick &lt;b&gt;" in html
        assert html.count('class="outcome came-out"') == 3
        assert 'class="beside across"' in html  # its titles leave no room for the paper's beside it
        assert html.count('data-src="data:image/webp') == html.count("<img ") == 1  # which the page's script shows
        assert "image.src = image.dataset.src" in html
        assert html.count("http://") + html.count("https://") == 1  # the notice of the library that draws charts

    def test_markdown_has_the_same_figures(self, table_1: Table) -> None:
        text = render_markdown([table_1], [("setting", "quick")])
        assert "| DreamBooth (miniature) | 0.600 (" in text
        assert "| Textual Inversion (Stable Diffusion) | 0.569 | 0.780 | 0.255 |" in text
        assert "not comparable" in text

    def test_the_number_of_images_goes_across(self) -> None:
        evaluations = {
            f"images-{count}-a": evaluation(dino=[count / 10], clip_t_no_identifier=[0.2], div=[0.1], near_copies=[0.0])
            for count in range(1, 6)
        }
        [table], _ = make_tables(trials_of(TABLE_5, {}), evaluations)
        html = render_page([table], [], {})
        head = html[html.index("<thead>") : html.index("</thead>")]
        assert "1 image" in head
        assert "5 images" in head


def test_the_facts_name_every_base_model_with_its_usual_settings(tmp_path: Path) -> None:
    setting = with_tables(full_setting(), ["steps", "super-resolution"])
    facts = describe_paper(plan_paper(setting, str(tmp_path), (), RESOURCES), BANK, evaluated=0)
    latent, cascade = sorted(value for what, value in facts if what == "base model")
    assert latent.startswith("miniature, hash ")
    assert "250 steps of training where a table doesn't say otherwise, 12 of sampling, guidance 4" in latent
    assert cascade.startswith("miniature-cascade, hash ")
    assert ": 200 and 150 steps of training" in cascade


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["paper", "--quick", "--page-only", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "no run" in result.stderr
    assert "has been evaluated yet" in result.stderr
