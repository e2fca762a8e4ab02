"""Images are sampled by their index."""

import numpy as np

from ddpm_hf.evaluation.sampling import sample_images
from ddpm_hf.pipelines.guidance import mark_null_class


def test_image_of_a_seed_does_not_depend_on_its_batch(tiny_pipeline):
    together = sample_images(tiny_pipeline, range(5), 4, 1, batch_size=5)
    alone = np.concatenate([sample_images(tiny_pipeline, [i], 4, 1, batch_size=1) for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(sample_images(tiny_pipeline, [0], 4, 2, batch_size=1) - together[:1]).max() > 0.05


def test_classes_cycle_by_index_unless_labels_are_given(make_pipeline):
    pipe = make_pipeline(num_class_embeds=4)
    mark_null_class(pipe.unet)
    cycled = sample_images(pipe, range(2, 5), 2, 0, batch_size=2)
    given = sample_images(pipe, range(2, 5), 2, 0, batch_size=3, class_labels=[2, 0, 1])
    np.testing.assert_allclose(cycled, given, atol=1e-5)
    assert np.abs(sample_images(pipe, range(2, 5), 2, 0, batch_size=3, class_labels=0) - cycled).max() > 1e-4
