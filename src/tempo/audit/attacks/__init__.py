"""Attacks: one small file and one line here for each."""

from __future__ import annotations

from tempo.audit.attack import Attack
from tempo.audit.attacks.cloak_truncation import CloakTruncation
from tempo.audit.attacks.consensus import Consensus
from tempo.audit.attacks.covariance import Covariance
from tempo.audit.attacks.cross_layer import CrossLayer
from tempo.audit.attacks.data_alignment import DataAlignment, DataAlignmentBase
from tempo.audit.attacks.directions import Directions
from tempo.audit.attacks.gradient_leakage import GradientLeakage
from tempo.audit.attacks.gradients_joint import GradientsJoint
from tempo.audit.attacks.gram import Gram
from tempo.audit.attacks.ica import ICA
from tempo.audit.attacks.information import Information
from tempo.audit.attacks.linking import Linking
from tempo.audit.attacks.model_theft import ModelTheft
from tempo.audit.attacks.nmf import NMF
from tempo.audit.attacks.procrustes import Procrustes
from tempo.audit.attacks.reconstruction import Reconstruction, ReconstructionBase
from tempo.audit.attacks.rekeying import Rekeying
from tempo.audit.attacks.robust_pca import RobustPCA
from tempo.audit.attacks.signatures import Signatures
from tempo.audit.attacks.singular_vectors import SingularVectors
from tempo.audit.attacks.span import Span
from tempo.audit.attacks.sparse_frame import SparseFrame
from tempo.audit.attacks.sparse_frame_inputs import SparseFrameInputs
from tempo.audit.attacks.spatial_ica import SpatialICA
from tempo.audit.attacks.two_round import TwoRound
from tempo.audit.attacks.zero_rows import ZeroRows

_ATTACKS: tuple[type[Attack], ...] = (
    Gram,  # keep one line each
    CrossLayer,
    ModelTheft,
    ZeroRows,
    SpatialICA,
    Span,
    SparseFrame,
    SparseFrameInputs,
    Consensus,
    TwoRound,
    CloakTruncation,
    RobustPCA,
    Signatures,
    Linking,
    Directions,
    Covariance,
    DataAlignment,
    DataAlignmentBase,
    ICA,
    NMF,
    SingularVectors,
    Reconstruction,
    ReconstructionBase,
    GradientLeakage,
    Procrustes,
    GradientsJoint,
    Rekeying,
    Information,
)

REGISTRY: dict[str, type[Attack]] = {attack.name: attack for attack in _ATTACKS}
