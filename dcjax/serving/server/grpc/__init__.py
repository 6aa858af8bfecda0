"""The policy behind JetStream's orchestrator and gRPC service.

`wire` says what travels beside the messages, `dcjax.serving.jetstream` mends the orchestrator, `driver` and `service`
put the engine behind it, `server` runs them, and `client` samples rollouts from a server.
"""
