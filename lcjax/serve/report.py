"""Speed and memory of a generation."""

from dataclasses import dataclass


@dataclass
class Report:
    """Sums over the batches of one call. Compilation is counted apart."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0  # by decode steps: the first token of a request belongs to its prefill
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0  # of the first batch, without compilation
    compile_seconds: float = 0.0
    cache_bytes: int = 0  # of the largest batch

    def add_prefill(self, tokens: int, seconds: float) -> None:
        """Count one batch of prompts."""
        self.first_token_seconds = self.first_token_seconds or seconds
        self.prompt_tokens += tokens
        self.prefill_seconds += seconds

    def add_decode(self, tokens: int, seconds: float) -> None:
        """Count one dispatch of decoding."""
        self.new_tokens += tokens
        self.decode_seconds += seconds

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second, all requests together."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def __str__(self) -> str:
        return (
            f"prefill {self.prompt_tokens} tokens at {self.prefill_rate:,.1f} tokens/s, "
            f"decode {self.new_tokens} tokens at {self.decode_rate:,.1f} tokens/s, "
            f"first token after {self.first_token_seconds:.2f} s, cache {self.cache_bytes:,} bytes, "
            f"compiling {self.compile_seconds:.1f} s"
        )
