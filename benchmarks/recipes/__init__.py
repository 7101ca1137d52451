"""Whole pipelines of published configurations with random weights, in full and in tiny size."""

from benchmarks.recipes.flux import flux, flux_loras
from benchmarks.recipes.hunyuan import hunyuanvideo
from benchmarks.recipes.ltx import ltx
from benchmarks.recipes.qwen import qwen
from benchmarks.recipes.recipe import MakeRecipe, Recipe
from benchmarks.recipes.sd3 import sd35
from benchmarks.recipes.sdxl import sdxl, sdxl_controlnet_ip
from benchmarks.recipes.source import Source
from benchmarks.recipes.wan import wan22

__all__ = ["RECIPES", "Recipe", "Source"]

RECIPES: dict[str, MakeRecipe] = {
    "sdxl": sdxl,
    "sdxl-controlnet-ip": sdxl_controlnet_ip,
    "sd35": sd35,
    "flux": flux,
    "flux-loras": flux_loras,
    "wan22": wan22,
    "hunyuanvideo": hunyuanvideo,
    "qwen": qwen,
    "ltx": ltx,
}
