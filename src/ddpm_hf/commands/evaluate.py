"""`ddpm-hf evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config.commands import EvaluateConfig
from .model import load_on_device, processes


def evaluate(model: str, config: EvaluateConfig) -> Path:
    """Measure a model, and write `metrics.json`, plots and its card; returns the path of `metrics.json`."""
    from ..evaluation.evaluate import evaluate as measure
    from ..evaluation.results import RESULTS_FILE, choose_output_dir
    from ..sampling.batch_size import out_of_memory_explained
    from ..sharing.card import CardFacts, is_average, write_card
    from ..storage.files import full_disk_explained

    folder, ema = choose_output_dir(model, config.output_dir), is_average(Path(model))
    state = processes()
    pipeline = load_on_device(model, config.revision, config.device)
    with (
        out_of_memory_explained(
            f"`batch_size` is {config.batch_size}: pass a smaller --batch_size. What was made before is kept."
        ),
        full_disk_explained(folder, remedy="Free some space; the same command then resumes."),
    ):
        results = measure(pipeline, replace(config, output_dir=str(folder)), ema=ema)
    if state.is_main_process:
        if config.update_card and (folder / "model_index.json").is_file():
            write_card(folder, CardFacts(results=[result.for_card() for result in results]))
        print(f"The results are in {folder / RESULTS_FILE}, with plots beside it.")
    return folder / RESULTS_FILE
