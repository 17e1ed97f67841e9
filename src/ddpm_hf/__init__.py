"""DDPM (Ho et al. 2020) for the Hugging Face ecosystem: process, scheduler, pipeline, training."""

from .card import write_card
from .ddpm_process import DDPMProcess
from .pipeline import DDPMPipelineCustom
from .scheduling_ddpm_custom import DDPMSchedulerCustom

DDPMPipelineCustom.write_card = write_card  # what the package saves has a card

__version__ = "0.1.0"
__all__ = ["DDPMPipelineCustom", "DDPMProcess", "DDPMSchedulerCustom", "__version__"]
