"""Orchestration of the method: the only importer of Ray, DeepSpeed and MLflow.

Everything in `__all__` can be imported from here.
"""

from typing import TYPE_CHECKING

from dreambooth.lazy import lazily

if TYPE_CHECKING:
    from pipelines.apps.evaluate_model import evaluate_model
    from pipelines.apps.generate import GenerateResult, generate
    from pipelines.cluster.ray_cluster import Resources, local_resources, ray_cluster
    from pipelines.driver.batch import BatchOutcome, run_batch
    from pipelines.driver.batch_console import BatchView
    from pipelines.driver.personalize import personalize
    from pipelines.driver.summary import PersonalizeResult
    from pipelines.plan.batch_plan import BatchPlan, make_batch_plan
    from pipelines.plan.run_plan import Plan, make_plan
    from pipelines.plan.subject_checks import check_subjects, valid_plans
    from pipelines.plan.subject_list import read_batch
    from pipelines.storage.publications import Manifest, fetch, opened, publish, published, read_manifest
    from pipelines.tracking.evaluation_record import RecordedFigures
    from pipelines.tracking.model_list import list_models
else:
    __getattr__ = lazily(
        __name__,
        {
            "apps.evaluate_model": ["evaluate_model"],
            "apps.generate": ["GenerateResult", "generate"],
            "cluster.ray_cluster": ["Resources", "local_resources", "ray_cluster"],
            "driver.batch": ["BatchOutcome", "run_batch"],
            "driver.batch_console": ["BatchView"],
            "driver.personalize": ["personalize"],
            "driver.summary": ["PersonalizeResult"],
            "plan.batch_plan": ["BatchPlan", "make_batch_plan"],
            "plan.run_plan": ["Plan", "make_plan"],
            "plan.subject_checks": ["check_subjects", "valid_plans"],
            "plan.subject_list": ["read_batch"],
            "storage.publications": ["Manifest", "fetch", "opened", "publish", "published", "read_manifest"],
            "tracking.evaluation_record": ["RecordedFigures"],
            "tracking.model_list": ["list_models"],
        },
    )

__all__ = [
    "BatchOutcome",
    "BatchPlan",
    "BatchView",
    "GenerateResult",
    "Manifest",
    "PersonalizeResult",
    "Plan",
    "RecordedFigures",
    "Resources",
    "check_subjects",
    "evaluate_model",
    "fetch",
    "generate",
    "list_models",
    "local_resources",
    "make_batch_plan",
    "make_plan",
    "opened",
    "personalize",
    "publish",
    "published",
    "ray_cluster",
    "read_batch",
    "read_manifest",
    "run_batch",
    "valid_plans",
]


def __dir__() -> list[str]:
    return __all__
