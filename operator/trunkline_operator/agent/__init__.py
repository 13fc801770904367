"""What users declare: a VoiceAgent parsed, its rules, and what its policy allows."""
