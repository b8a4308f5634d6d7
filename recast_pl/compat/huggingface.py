"""Uses of huggingface_hub beyond its documented interface. It is imported when it is needed: that takes a second."""


def hub_failures() -> tuple[type[Exception], ...]:
    """The exceptions that its functions raise because of the network, the server, the disk or a wrong argument.

    The base class of those of its HTTP library has another home in each major version; `huggingface_hub.errors`
    imports it. Uploads raise RuntimeError.
    """
    from huggingface_hub import errors  # noqa: PLC0415

    return (errors.HTTPError, OSError, ValueError, RuntimeError)
