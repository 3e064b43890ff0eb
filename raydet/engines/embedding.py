"""Outputs of a model in torch → the embeddings of its queries and of the image, from the same forward pass."""

from typing import Any

from torch import Tensor, nn

from raydet.models.detector import Detector


class EmbeddingReader:
    """Reader of a model's embeddings.

    Only some families return the features of their encoder, and none returns the mask of the padding in them. All
    decoders receive both, so a hook before the decoder notes them.
    """

    def __init__(self, detector: Detector) -> None:
        """Install the hook; one thread at a time may run the model."""
        self._family, self._num_queries = detector.family, detector.num_queries
        self._received: dict[str, Any] = {}
        if self._family.decoder is not None:
            decoder = detector.model.get_submodule(self._family.decoder)
            decoder.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._received = kwargs

    def vectors(self, outputs: Any) -> dict[str, Tensor]:
        """Return the embeddings of the latest forward pass.

        Returns:
            `embedding` [B, Q, D], the last hidden state of the decoder, and `image_embedding` [B, D], the mean of the
            encoder's features over the positions of the image, in single precision.
        """
        hidden = outputs.last_hidden_state
        received, self._received = self._received, {}
        if self._family.decoder is None:  # A class token, the patches and the queries are one sequence.
            return {
                "embedding": hidden[:, -self._num_queries :],
                "image_embedding": hidden[:, 1 : -self._num_queries].float().mean(dim=1),
            }
        features = received["encoder_hidden_states"].float()
        if not self._family.uses_pixel_mask:
            return {"embedding": hidden, "image_embedding": features.mean(dim=1)}
        is_image = received[self._family.decoder_mask].bool()[..., None]
        total = features.where(is_image, 0.0).sum(dim=1)
        return {"embedding": hidden, "image_embedding": total / is_image.sum(dim=1).clamp(min=1)}
