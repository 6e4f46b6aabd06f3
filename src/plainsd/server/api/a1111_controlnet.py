"""The routes of A1111's ControlNet extension, which its clients ask before they send units in `alwayson_scripts`."""

import base64
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from plainsd.errors import UserError
from plainsd.pictures.control import control_name
from plainsd.pictures.settings import PREPROCESSORS, THRESHOLDS
from plainsd.pictures.texts.controls import IMAGE_MODULES, INPAINT_MODULES
from plainsd.server.controls import map_within
from plainsd.server.errors import APIError
from plainsd.server.schema import Text
from plainsd.server.service import Service
from plainsd.server.uploads import picture, png

API_VERSION = 2  # of the extension's API, whose units are dictionaries


class Detect(BaseModel):
    """POST /controlnet/detect."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    controlnet_module: Text = "none"
    controlnet_input_images: list[Text] = Field(min_length=1, max_length=16)
    controlnet_processor_res: int = Field(512, le=2048, description="of the shorter side; below 1: as the image is")
    controlnet_threshold_a: float = Field(-1, le=1e4, description="below 0: the preprocessor's own")
    controlnet_threshold_b: float = Field(-1, le=1e4)


def controlnet_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/controlnet", tags=["A1111"])

    @router.get("/version")
    def version() -> dict[str, int]:
        return {"version": API_VERSION}

    @router.get("/model_list")
    def model_list() -> dict[str, list[str]]:
        """ControlNets, T2I-Adapters and IP-Adapters, with their hashes."""
        models = service.models
        paths = [*models.controls.known().values(), *models.image_adapters.known().values()]
        return {"model_list": sorted(control_name(path) for path in paths)}

    @router.get("/module_list")
    def module_list() -> dict[str, Any]:
        modules = [*PREPROCESSORS, *INPAINT_MODULES, *IMAGE_MODULES]
        detail = {name: {"model_free": False, "sliders": []} for name in modules}
        return {"module_list": modules, "module_detail": detail}

    @router.post("/detect")
    def detect(body: Detect) -> dict[str, Any]:
        """The maps that a preprocessor makes of pictures."""
        low, high = body.controlnet_threshold_a, body.controlnet_threshold_b
        thresholds = (THRESHOLDS[0] if low < 0 else low, THRESHOLDS[1] if high < 0 else high)
        resolution = body.controlnet_processor_res if body.controlnet_processor_res > 0 else None
        maps = []
        for image in body.controlnet_input_images:
            given = picture(image, "controlnet_input_images", service.limits, "black")
            try:
                made = map_within(service.limits, given, body.controlnet_module.lower(), thresholds, resolution)
            except UserError as error:
                raise APIError(422, str(error), "controlnet_module", body.controlnet_module) from None
            maps.append(base64.b64encode(png(made)).decode())
        return {"images": maps, "info": "Success"}

    return router
