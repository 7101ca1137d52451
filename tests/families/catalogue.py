"""Every family that the suite runs, and every class that it leaves out, with the reason."""

from __future__ import annotations

from tests.families import (
    catalogue_audio,
    catalogue_controlnets,
    catalogue_flux,
    catalogue_hunyuan,
    catalogue_image,
    catalogue_qwen,
    catalogue_unets,
    catalogue_video,
    catalogue_wan,
)
from tests.families.family import Family

FAMILIES: tuple[Family, ...] = (
    *catalogue_flux.FAMILIES,
    *catalogue_image.FAMILIES,
    *catalogue_qwen.FAMILIES,
    *catalogue_wan.FAMILIES,
    *catalogue_hunyuan.FAMILIES,
    *catalogue_video.FAMILIES,
    *catalogue_audio.FAMILIES,
    *catalogue_unets.FAMILIES,
    *catalogue_controlnets.FAMILIES,
)

_AUTOENCODER = "an autoencoder: runs once, not once a step"
_VOCODER = "makes sound of what was denoised: runs once, not once a step"
_LIST = "a list of ControlNets without weights of its own: its members are in the catalogue"
_NO_FORWARD = "weights for another model: has no forward of its own"

#: class -> why it is not in the catalogue
EXCLUDED: dict[str, str] = {
    "AnimaTextConditioner": "encodes a prompt: runs once, not once a step",
    "AutoencoderKL": _AUTOENCODER,
    "AutoencoderKLCogVideoX": _AUTOENCODER,
    "AutoencoderKLFlux2": _AUTOENCODER,
    "AutoencoderKLKVAEVideo": _AUTOENCODER,
    "AutoencoderKLMiniMaxH3": _AUTOENCODER,
    "AutoencoderKLMochi": _AUTOENCODER,
    "AutoencoderRAE": _AUTOENCODER,
    "ControlNetXSAdapter": _NO_FORWARD,
    "CosmosControlNetModel": "needs torchvision, which is not a requirement of the tests",
    "FluxMultiControlNetModel": _LIST,
    "HunyuanDiT2DMultiControlNetModel": _LIST,
    "Kandinsky6SRLatentUpscalerBank": "scales latents up: runs once, not once a step",
    "Kandinsky6SRVAE": _AUTOENCODER,
    "LTX2VideoDiffusionDecoderModel": "decodes a video and draws noise inside: runs once",
    "MMAudioVAE": _AUTOENCODER,
    "MMAudioVocoder": _VOCODER,
    "MotionAdapter": _NO_FORWARD,
    "MultiControlNetModel": _LIST,
    "MultiControlNetUnionModel": _LIST,
    "QwenImageMultiControlNetModel": _LIST,
    "RFD4ProteinaAutoencoder": _AUTOENCODER,
    "SD3MultiControlNetModel": _LIST,
    "ZImageControlNetModel": "borrows its embedders from a transformer: none stands alone",
}

#: family -> what its own forward replaces by something equal, attached or not
REPLACED_BY_FORWARD: dict[str, set[str]] = {
    "omnigen": {"rope: inv_freq"},  # registers the buffer anew in every forward
    "qwen-image-2.1": {"pos_embed.freqs"},  # makes the list anew in every forward
}
