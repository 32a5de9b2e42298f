"""The engine: grid -> plan -> stack -> trainer -> store."""
