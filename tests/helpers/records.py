"""What runs leave, as tests compare it."""


def untimed(records):
    """Metrics of steps without those that measure the machine."""
    return [
        {
            name: value
            for name, value in record.items()
            if not name.startswith("time/") and not name.endswith("tokens_per_second")
        }
        for record in records
    ]
