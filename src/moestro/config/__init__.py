"""The settings of each component: frozen, nested, one default in one place."""

from moestro.config.attention import (
    AttentionConfig,
    CacheKind,
    ConvConfig,
    DeltaConfig,
    IndexerConfig,
    LatentConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RelativeConfig,
    RopeConfig,
    TemperatureConfig,
    WindowConfig,
    YarnScaling,
)
from moestro.config.mixture import (
    CapacityConfig,
    DenseConfig,
    ExpertsConfig,
    MoEConfig,
    RouterConfig,
    SharedConfig,
)
from moestro.config.model import (
    EncDecConfig,
    HeadConfig,
    LayerSpec,
    ModelConfig,
    NetworkConfig,
    NormConfig,
    StackSpec,
)
from moestro.config.parallel import Layout, ParallelConfig
from moestro.config.run import (
    BalanceConfig,
    ChatConfig,
    DataConfig,
    LoraConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
)

__all__ = [
    "AttentionConfig", "BalanceConfig", "CacheKind", "CapacityConfig", "ChatConfig", "ConvConfig",
    "DataConfig", "DeltaConfig", "DenseConfig", "EncDecConfig", "ExpertsConfig", "HeadConfig",
    "IndexerConfig", "LatentConfig", "LayerSpec", "Layout", "LinearScaling", "Llama3Scaling",
    "LongRopeScaling",
    "LoraConfig", "MoEConfig", "ModelConfig", "NetworkConfig", "NormConfig", "OptimConfig",
    "ParallelConfig", "RelativeConfig", "RopeConfig", "RouterConfig", "RunConfig", "RuntimeConfig",
    "SharedConfig", "StackSpec", "TemperatureConfig", "TrainConfig", "WindowConfig", "YarnScaling",
]  # fmt: skip
