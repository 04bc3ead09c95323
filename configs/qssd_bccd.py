"""A small quadratic SSD on the blood cells of BCCD: 205 images, 3 classes.

    python -m efficient_nets.main --config=configs/qssd_bccd.py --workdir=runs/qssd_bccd
    python -m efficient_nets.main --config=configs/qssd_bccd.py:linear
    python -m efficient_nets.main --config=configs/qssd_bccd.py --workdir=runs/qssd_bccd \\
        --mode=predict --step=best --input=IMAGE_OR_FOLDER

3,870,512 parameters, 215 M MACs; linear 1,505,456 and 92 M. 20 epochs at 128
pixels, seed 0, one run each; of the test split's 72 images, with how long training took on two CPU
cores that had other work to do:

    net        ap50     RBC      WBC      Platelets   ap       training
    linear     60.5 %   64.3 %   96.4 %   20.8 %      30.0 %   29 minutes
    quadratic  58.0 %   61.6 %   83.6 %   28.7 %      24.4 %   57 minutes
"""

from efficient_nets import config as configs
from efficient_nets import names, recipes


def get_config(neuron: str = "quadratic"):
    names.pick("the config's argument", neuron, {"quadratic": None, "linear": None})
    config = configs.defaults()
    config.task = "detection"
    config.model = configs.model("ssd", backbone="resnet", blocks=(1, 1, 1, 1), width=0.5)
    if neuron == "quadratic":
        config.layers = (dict(recipes.QUADRATIC_DETECTOR),)
    config.data.name = "bccd"
    config.data.validation = "validation"
    config.data.image_size = 128
    config.data.max_boxes = 40
    config.data.flip = True
    config.detection.expand = 1.5
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 10.0
    config.schedule.warmup_epochs = 2.0
    config.train.epochs = 20.0
    config.train.batch_size = config.evaluate.batch_size = 16
    config.evaluate.every_epochs = config.checkpoint.every_epochs = 10.0
    config.log.every_steps = 12
    return config
