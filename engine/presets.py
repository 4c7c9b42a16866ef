"""Two trainings: PAPER, the paper's method and nothing else, and BEST, the one with the highest figures measured here.

    PRESETS["paper"], PRESETS["best"]; engine.config.override(PAPER, {"backbone": "resnet50", "size": 256})

Where the paper is silent PAPER has the value of IRN (Ahn et al., CVPR 2019). tests/test_defaults.py names the section
of each of its values.
"""

from engine.config import (
    BranchesConfig,
    CamConfig,
    LabelConfig,
    Preset,
    PtsConfig,
    SaliencyConfig,
    Schedule,
    StudentTrainingConfig,
)
from models.fusion_config import FusionConfig
from models.wsid_net import NetConfig

_PAPER_SCHEDULE = Schedule(epochs=5, batch_size=6, lr=0.01, optimizer="sgd", backbone_lr=0.1, freeze=1)
_PAPER_FUSION = FusionConfig(
    grouping="sinks",
    centroid_region="image",
    sink_thresh=2.5,
    theta=0.5,
    radius=5,
    power=10,
    steps=256,
    saliency_thresh=0.5,
    mask_rule="peak",
    mask_thresh=0.5,
    min_area=0.01,
    min_score=0,
    count_aware_scores=False,
)

PAPER = Preset(
    name="paper",
    cam=CamConfig(_PAPER_SCHEDULE, backbone="resnet50", output_stride=16, size=512),
    labels=LabelConfig(scales=(1.0, 0.5, 1.5, 2.0), spread=False, crf=True),
    network=NetConfig(
        backbone="resnet50",
        output_stride=16,
        size=512,
        channels=256,
        mixing=True,
        attention="parallel",
        enhancement=True,
        canny="auto",
        count_head=False,
    ),
    branches=BranchesConfig(_PAPER_SCHEDULE, radius=10, lsu_weight=1.0, lsu_form="mse", centroid_target_weight=0.0),
    saliency=SaliencyConfig(_PAPER_SCHEDULE),
    pts=PtsConfig(
        Schedule(epochs=8, batch_size=6, lr=1e-4, optimizer="sgd", backbone_lr=1.0, freeze=1),
        iterations=6,
        fusion=_PAPER_FUSION,
        saliency_weight=0.0,
        init_mask_weight=0.0,
    ),
    fusion=_PAPER_FUSION,
)

_BEST_BRANCHES = BranchesConfig(
    Schedule(epochs=2, batch_size=8, lr=0.001, optimizer="adamw", backbone_lr=0.1, freeze=3),
    radius=5,
    lsu_weight=0.02,
    lsu_form="huber",
    centroid_target_weight=0.1,
)
_BEST_PTS = PtsConfig(
    Schedule(epochs=1, batch_size=8, lr=0.004, optimizer="sgd", backbone_lr=0.5, freeze=2),
    iterations=2,
    # Labels were measured with masks cut at half of the own peak, and instances grouped by the predicted count.
    fusion=FusionConfig(grouping="count", mask_rule="peak", mask_thresh=0.5),
    saliency_weight=0.5,
    init_mask_weight=1 / 3,
)

BEST = Preset(
    name="best",
    cam=CamConfig(
        Schedule(epochs=3, batch_size=16, lr=0.05, optimizer="sgd", backbone_lr=0.1, freeze=2),
        backbone="tf_efficientnet_lite2",
        output_stride=32,
        size=320,
    ),
    labels=LabelConfig(scales=(1.0, 2.0), spread=True, crf=True),
    network=NetConfig(backbone="tf_efficientnet_lite2", output_stride=16, size=256, channels=64, count_head=True),
    branches=_BEST_BRANCHES,
    saliency=SaliencyConfig(
        Schedule(epochs=3, batch_size=8, lr=0.012, optimizer="sgd", backbone_lr=0.5, freeze=2),
    ),
    pts=_BEST_PTS,
    fusion=FusionConfig(),
    student=StudentTrainingConfig(
        Schedule(
            epochs=3, batch_size=16, lr=8e-4, optimizer="adamw", backbone_lr=0.25, freeze=3, warmup=100, average=0.998
        ),
        rounds=4,
        backbone="tf_efficientnet_lite2",
        size=384,
        pyramid_channels=96,
        freeze_depthwise=True,
        resolution=0.4,
    ),
)

PRESETS = {preset.name: preset for preset in (PAPER, BEST)}
