"""Names to objects: lazily, once, and with clear refusals."""

import pytest

from moeforge import registry
from moeforge.errors import UsageProblem
from moeforge.registry import Entry


@pytest.fixture
def third_party(monkeypatch):
    def install(*found):
        monkeypatch.setattr(registry, "_third_party", lambda: found)

    return install


def test_unknown_names_suggest_a_near_one():
    with pytest.raises(UsageProblem, match="did you mean 'upcycle'"):
        registry.find("moeforge.verbs", "upcicle", "verb")


def test_two_providers_of_one_name_must_be_told_apart(third_party):
    third_party(Entry("moeforge.verbs", "upcycle", "json:dumps", "Other_Forge"))
    with pytest.raises(UsageProblem, match="moeforge:upcycle or Other_Forge:upcycle"):
        registry.find("moeforge.verbs", "upcycle", "verb")
    assert registry.find("moeforge.verbs", "other-forge:upcycle", "verb").target == "json:dumps"


def test_a_provider_that_cannot_be_imported_is_named(third_party):
    third_party(Entry("moeforge.verbs", "mend", "no_such_module:X", "moeforge-mend"))
    with pytest.raises(UsageProblem, match="'mend' comes from moeforge-mend, which is broken: ModuleNotFoundError"):
        registry.find("moeforge.verbs", "mend", "verb").load()


def test_another_interface_version_is_refused(third_party, monkeypatch):
    class Future:
        api_version = 2

    monkeypatch.setattr(registry, "load_object", lambda target: Future)
    third_party(Entry("moeforge.verbs", "mend", "x:Future", "moeforge-mend"))
    with pytest.raises(UsageProblem, match="plugin interface 2, this moeforge speaks 1"):
        registry.find("moeforge.verbs", "mend", "verb").load()


def test_every_builtin_name_resolves_to_a_class_of_that_name():
    for group in registry._builtins():
        for name, (entry, *_) in registry.entries(group).items():
            assert entry.load().name == name


def test_the_environment_limits_third_parties(monkeypatch):
    monkeypatch.setenv("MOEFORGE_PLUGINS", "")
    registry._third_party.cache_clear()
    try:
        assert registry._third_party() == ()
    finally:
        registry._third_party.cache_clear()
