from pair_data import small_config
from torch.testing import assert_close

from valign.models.diffusion.lora import attach_lora, unload_adapters
from valign.objectives import DiffusionDPO
from valign.training.engine.processes import start_processes
from valign.training.tasks.preference.batches import PairSource
from valign.training.tasks.preference.pair_step import PairStep
from valign.training.tasks.preference.reference import reference_table


def test_stored_errors_are_those_of_the_live_reference(sd, cache, tmp_path, monkeypatch):
    config = small_config(precompute_ref_draws=2)
    attach_lora(sd, rank=2)
    try:
        source = PairSource(sd, cache, cache.rows()[:5], config)
        step = PairStep(sd, DiffusionDPO(), config, start_processes(cpu=True))
        table = reference_table(step, source, tmp_path, safe_caption=False, batch=4)
        assert table.errors.shape == (5, 2, 2)
        for visits in ([(0, 0), (4, 1)], [(2, 2), (1, 5)]):  # the third visit takes the first draw again
            assert_close(table.at(visits), step.errors(source.visit(visits), reference=True), rtol=1e-5, atol=1e-6)
        monkeypatch.setattr(PairStep, "errors", None)  # read back, not computed again
        assert_close(reference_table(step, source, tmp_path, safe_caption=False, batch=4).errors, table.errors)
        assert len(list(tmp_path.iterdir())) == 1
    finally:
        unload_adapters(sd)
