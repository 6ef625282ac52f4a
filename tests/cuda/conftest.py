import pytest
from cuda_devices import Device, get_device


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    return get_device(request.param)
