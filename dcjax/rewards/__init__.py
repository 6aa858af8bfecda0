"""Verifiers: functions on the host that judge one finished response. No JAX."""
