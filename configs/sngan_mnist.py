"""A small SNGAN on MNIST at 16x16, linear or quadratic, for two CPU cores.

    python -m efficient_nets.main --config=configs/lenet.py --workdir=runs/lenet16 \\
        --config.data.image_size=16 --config.model.width=0.5 --config.train.epochs=3
    python -m efficient_nets.main --config=configs/sngan_mnist.py \\
        --config.generation.features=runs/lenet16
    python -m efficient_nets.main --config=configs/sngan_mnist.py:ours \\
        --config.generation.features=runs/lenet16
    python -m efficient_nets.main --config=configs/sngan_mnist.py:linear,dataset=fashion_mnist

74,402 parameters, 5.69 M MACs for one image of each part; quadratic 169,202 and 16.8 M. One
epoch, 1,875 updates of each part with 32 images.

FID against the test split by that LeNet's 64 features, 2,000 samples, seed 0, CPU: 24.3 at the end
(IS 6.3); quadratic 26.3 after 1,404 updates, where the linear one had 27.5. One
seed. The linear run took 20 minutes on two CPU cores that other programs shared.
"""

from efficient_nets import recipes


def get_config(argument: str = "linear"):
    given = recipes.arguments(argument, neuron="linear", dataset="mnist")
    config = recipes.sngan(given["dataset"], neuron=given["neuron"])
    config.data.image_size = 16
    config.model.latent = 64
    config.model.generator_features = 24
    config.model.discriminator_features = 24
    config.model.discriminator_blocks = 3
    config.generation.critic_updates = 1
    config.generation.generator_batches = 1
    config.generation.samples = 2000
    config.optimizer.learning_rate = 5e-4
    config.schedule.name = "constant"
    config.train.batch_size = 32
    config.train.epochs = 1.0
    config.train.ema = 0.99
    config.evaluate.every_epochs = 0.125
    config.checkpoint.every_epochs = 0.125
    return config
