"""A small quadratic SSD on blood cells."""

from efficient_nets import config as configs
from efficient_nets import recipes


def get_config(neuron: str = "ours"):
    config = configs.defaults()
    config.task = "detection"
    config.model = configs.model("ssd", backbone="resnet", blocks=(1, 1, 1, 1), width=0.5)
    if neuron != "linear":
        rule = recipes.QUADRATIC | {"neuron": neuron}
        config.layers = (dict(match=r"backbone/stage\d/.*/conv\d", **rule),)
    config.data.name = "bccd"
    config.data.train, config.data.validation, config.data.test = "train", "validation", "test"
    config.data.image_size = 160
    config.data.max_boxes = 40
    config.data.flip = True
    config.detection.expand = 1.5
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 10.0
    config.schedule.warmup_epochs = 2.0
    config.train.epochs = 60.0
    config.train.batch_size = 16
    config.evaluate.batch_size = 16
    config.evaluate.every_epochs = 5.0
    config.checkpoint.every_epochs = 5.0
    config.log.every_steps = 12
    return config
