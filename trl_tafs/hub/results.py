"""An evaluation's results on the card of an adapter on the Hub."""

from __future__ import annotations

from typing import Any

from trl_tafs.evaluation.results import Results
from trl_tafs.evaluation.statistics import IMAGE_STATISTICS
from trl_tafs.hub.push import push_errors


def card_results(results: Results, model: str, dataset: str) -> list[Any]:
    """Return a model's means as the Hub's `EvalResult`s, one a metric and sampling."""
    from huggingface_hub import EvalResult

    found = []
    for row in results.rows:
        s = row.sampling
        for name, estimate in row.metrics.items():
            if row.model != model or name in IMAGE_STATISTICS or name == "diversity":
                continue
            how = f"{s.sampler}, {s.num_steps} steps, {s.height} x {s.width}, {s.nfe} NFE"
            if s.embedded_guidance_scale is not None:
                how += f", embedded guidance {s.embedded_guidance_scale:g}"
            found.append(
                EvalResult(
                    task_type="text-to-image",
                    dataset_type=dataset.replace(" ", "_"),
                    dataset_name=dataset,
                    metric_type=name,
                    metric_name=f"{results.title(name)} ({how})",
                    metric_value=round(estimate.mean, 6),
                    dataset_config=s.label,
                )
            )
    return found


def push(results: Results, model: str, repo_id: str, dataset: str, token: str | None = None) -> str:
    """Add a model's results to the card of its repository, replacing those of the same metric and sampling.

    Returns:
        The URL of the commit.

    Raises:
        PushError: the Hub or the network refuses.
    """
    from huggingface_hub import ModelCard, metadata_update
    from huggingface_hub.repocard_data import eval_results_to_model_index

    with push_errors(repo_id):
        name = ModelCard.load(repo_id, token=token).data.to_dict().get("model_name") or repo_id.rpartition("/")[2]
        index = eval_results_to_model_index(name, card_results(results, model, dataset))
        return metadata_update(
            repo_id, {"model-index": index}, overwrite=True, token=token, commit_message="Add evaluation results"
        )
