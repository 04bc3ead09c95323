"""A LeNet on 96 digits, both convolutions quadratic: three rounds take seconds."""

import jax
import pytest

from efficient_nets import config as configs


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """What is slow here is compiling, and more so for eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        yield


@pytest.fixture
def config():
    return tiny_config()


def tiny_config():
    config = configs.defaults()
    config.model = configs.model("lenet", width=0.125)
    config.layers = (dict(match="conv", neuron="ours"),)
    config.data.name = "digits"
    config.data.train, config.data.validation = "train[:96]", "train[96:196]"
    config.data.test = "test[:40]"
    config.optimizer.learning_rate = 0.05
    config.optimizer.rules = (dict(match="conv[12]/[ab]/", learning_rate=0.5),)
    config.train.batch_size, config.evaluate.batch_size = 32, 64
    config.train.epochs = 4.0
    config.log.every_steps, config.log.tensorboard = 2, False
    config.builder.budget, config.builder.keep = "macs", 0.3
    config.builder.mask_seeds = 2
    return config
