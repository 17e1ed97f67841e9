"""`ddpm-hf export`: a model for programs other than PyTorch."""

from __future__ import annotations

from pathlib import Path

from ..config.commands import ExportConfig


def export(model: str, config: ExportConfig) -> Path:
    """Write a model's network in ONNX and its sampler in JSON, for programs in any language; returns their folder."""
    from ..export.export import MODEL_FILE, SAMPLER_FILE, export_onnx
    from ..storage.loading import load_pipeline

    if config.output_dir is None and not Path(model).is_dir():
        raise ValueError(f"{model!r} is no folder to export into: say where with --output_dir FOLDER.")
    folder = Path(model) / "onnx" if config.output_dir is None else Path(config.output_dir)
    pipeline = load_pipeline(model, config.revision)
    pipeline.scheduler = config.configure(pipeline.scheduler)
    spacing = "optimal" if config.timestep_spacing == "optimal" else None
    facts = export_onnx(
        pipeline,
        folder,
        config.dtype,
        num_inference_steps=config.num_inference_steps,
        timesteps=spacing,
        eta=config.eta,
        solver_order=config.solver_order,
    )["model"]
    print(
        f"Exported to {folder}/: {MODEL_FILE}, whose predictions differ from PyTorch's by at most "
        f"{facts['largest_difference']:.1e} of {facts['largest_prediction']:.2g}, and {SAMPLER_FILE}."
    )
    return folder
