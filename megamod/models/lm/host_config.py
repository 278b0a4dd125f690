"""Entry of AutoConfig for stock models with experts, whose classes are built on demand."""

from transformers import PreTrainedConfig

from megamod.states.forest import HOST_TYPE


class DemixHostConfig(PreTrainedConfig):
    """Reads config.json of a stock model with experts; the class it returns depends on `host`."""

    model_type = HOST_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: object) -> PreTrainedConfig:
        """Return a configuration of the class that `make_host_classes` makes for the field `host`.

        Arguments are those of `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: if the field `host` is missing or names no family of `HOSTS`, or a value of
                `untie`, `domains` or `anchored` is not allowed.
        """
        # Imported late: AutoConfig registers this class while transformers is still being imported.
        from megamod.models.lm.host import make_host_classes

        return make_host_classes(config_dict.get("host"))[0].from_dict(config_dict, **kwargs)
