"""The control plane of Trunkline: VoiceAgent resources in; pods, routes and Modal apps out."""
