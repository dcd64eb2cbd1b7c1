"""Train a codec for pages: what a device would send in place of a scan.

    stepjax tofc train configs/documents/tofc.py
    stepjax tofc evaluate runs/documents_tofc

A page has 64 features of 256 channels before the projector's matrix; 48 principal components of them are coded, and of
the thumbnail one. They are not merged, because a transcript needs them all, in their places. The projector and the
decoder train along, so that they learn to read what is left.
"""

import dataclasses
from pathlib import Path

from stepjax.config import InitConfig, SftConfig, TofcConfig
from stepjax.config_file import load_recipe

base = load_recipe(Path(__file__).with_name("sft_control.py"), SftConfig)

config = dataclasses.replace(
    base,
    name="documents_tofc",
    init_from=InitConfig(path="runs/documents_sft"),
    model=dataclasses.replace(
        base.model,
        tofc=TofcConfig(
            width=4 * base.model.vision.width,
            bottleneck=48,
            global_clusters=1,
            crop_clusters=64,
            experts=4,
            hidden=64,
            rate_weight=0.2,
        ),
    ),
    optimizer=dataclasses.replace(base.optimizer, learning_rate_scales=(("tofc/", 5.0),)),
)
