"""Needles under keys of three words in real text, for memories up to 100M tokens.

    python train.py --config=configs/curve.py --workdir=runs/curve
    python eval.py --task=curve --workdir=runs/curve --memory_tokens=16384,1048576,100000000

The demo's recipe, 460 steps of it, with a bank that grows to 64K tokens: in the last 160 steps every question is asked
of its own 64 documents and of the 448 of the seven batches before. 22 minutes on one CPU core that other work shared,
1.9 s of CPU time a step; docs/results.md has the scores.
"""

from ml_collections import ConfigDict

from msa_jax.configs.demo import get_config as demo


def get_config() -> ConfigDict:
    config = demo()
    config.data.key_format = "{a}-{b}-{n}"
    config.model.router_bias_init = 60.0
    config.training.max_routing = 24
    config.training.phases = [
        {"steps": 60, "lm_weight": 0.1, "aux_weight": 1.0, "lr_scale": 1.0, "mean_over_tokens": True, "recent": 0},
        {"steps": 160, "lm_weight": 1.0, "aux_weight": 0.5, "lr_scale": 1.0, "mean_over_tokens": False, "recent": 0},
        {"steps": 80, "lm_weight": 1.0, "aux_weight": 0.5, "lr_scale": 1.0, "mean_over_tokens": False, "recent": 1},
        {"steps": 160, "lm_weight": 1.0, "aux_weight": 0.5, "lr_scale": 1.0, "mean_over_tokens": False, "recent": 7},
    ]
    return config
