"""A static KV cache of product-quantised codes for Hugging Face transformers (MILLION, DAC'25, arXiv 2504.03661)."""

from million_cache.attention import disable, enable
from million_cache.cache import MillionStaticCache
from million_cache.calibration import calibrate
from million_cache.codebook import Codebooks
from million_cache.config import PRESETS, PQConfig

__all__ = ["PRESETS", "Codebooks", "MillionStaticCache", "PQConfig", "calibrate", "disable", "enable"]
