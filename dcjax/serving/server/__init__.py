"""The deployed policy behind JetStream's orchestrator and gRPC service. Import its modules by name: each is heavy.

`wire` says what travels beside the messages, `jetstream` mends the orchestrator, `driver` and `service` put the engine
behind it, `server` runs them, and `client` samples rollouts from a server.
"""
