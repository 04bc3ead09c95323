"""ResNet-50 on ImageNet, data streamed by worker processes, bfloat16 products.

    python -m efficient_nets.data.prepare imagenet2012        # needs the archives, see TFDS
    python -m efficient_nets.main --config=configs/imagenet_resnet.py --workdir=runs/imagenet
    python -m efficient_nets.main --config=configs/imagenet_resnet.py:18

25,557,032 parameters, 4.1 G MACs. The argument is the depth: 18, 34, 50 or 101. Expected after 90
epochs: 76% top-1 for depth 50 and 70% for depth 18, the figures of the literature for this recipe
(batch 1024, learning rate 0.1 for each 256 images, 5 epochs of warm-up, cosine); not run by us.
"""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(depth: str = "50"):
    config = recipes.imagenet()
    config.model = configs.model(
        "resnet", depth=int(depth), layout="imagenet", zero_init_gamma=True
    )
    config.optimizer.learning_rate = 0.4
    config.schedule.warmup_epochs = 5.0
    config.train.epochs = 90.0
    config.train.batch_size = 1024
    config.train.label_smoothing = 0.1
    return config
