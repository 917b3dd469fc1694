// The curve as a node of autograd's graph. The page `kernels.node` tells what each section is for. What a kernel is
// handed, `struct Call` of curve.cpp, stands before this file when it is compiled.

// == handed
#include <ATen/EmptyTensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

using I = int64_t;
using at::Tensor;
using torch::autograd::variable_list;

enum Kind { LOST, FORWARD, BACKWARD, KINDS };
static I (*kernels[3][KINDS])(const Call*); // of float32, float64 and bfloat16
static PyObject* otherwise; // the way back in Python
static c10::DispatchKeySet usual, frozen; // what ordinary memory is known by; the second if it was made for inference

static int row(at::ScalarType t) { return t == at::kFloat ? 0 : t == at::kDouble ? 1 : t == at::kBFloat16 ? 2 : -1; }

// == gate
static bool watched() { // as `transformed` in _torch.py, but for torch.compile
  using c10::DispatchKey;
  return c10::impl::TorchDispatchModeTLS::stack_len() || c10::impl::tls_is_dispatch_key_included(DispatchKey::Tracer)
      || c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode)
      || torch::autograd::ForwardADLevel::try_get_by_idx(0);
}
static bool ordinary(const Tensor& t) { return t.defined() && t.key_set() == usual; }
static bool within(const Tensor& t) { // its storage, which may have been freed or resized
  return t.storage().nbytes() >= (t.storage_offset() + t.numel())*t.itemsize();
}

// == call
struct Layout { I outer, channels, inner, repeat; }; // as `layout_of` in layout.py finds it
static bool channels_last(const Tensor& x, I dim) {
  bool last = (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
              (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d));
  return last && (dim == 1 || dim == 1 - x.dim());
}
static Layout layout(const Tensor& x, I dim, I num) { // no channels where the kernels cannot
  constexpr I SHORT = 64, ROW = 4096;
  bool dense = x.is_contiguous();
  I numel = x.numel(), inner = 1;
  if (!dense && !channels_last(x, num == 1 ? 1 : dim)) return {};
  if (num == 1) return {(numel + ROW - 1)/ROW, 1, std::min(numel, ROW), 1};
  if (dense) for (I d = (dim < 0 ? dim + x.dim() : dim) + 1; d < x.dim(); d++) inner *= x.size(d);
  I repeat = inner < SHORT ? inner : 1;
  return {numel/(num*inner), num*repeat, inner/repeat, repeat};
}
static Tensor like(const Tensor& t) { return at::detail::empty_strided_cpu(t.sizes(), t.strides(), t.scalar_type()); }
static void* at_of(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

template<class From, class To> static Tensor converted(const Tensor& t, at::ScalarType to) { // few values
  Tensor res = at::detail::empty_cpu(t.sizes(), to);
  const From* from = t.const_data_ptr<From>();
  To* all = res.mutable_data_ptr<To>();
  for (I i = 0; i < t.numel(); i++) all[i] = static_cast<To>(from[i]);
  return res;
}
struct Given { // an input, or what lies in memory as it did, and the parameters that go with it
  Layout lay{};
  I num = 1;
  Tensor values[3]; // leak, sub and maxv as the kernels read them
  Call call{};
  Given(const Tensor& x, const Tensor* params, I dim) {
    at::ScalarType type = x.scalar_type(), wide = type == at::kDouble ? at::kDouble : at::kFloat;
    for (int i = 0; i < 3; i++) num = std::max(num, params[i].numel());
    if (num > 1 && (dim < -x.dim() || dim >= x.dim() || x.size(dim) != num)) return;
    for (int i = 0; i < 3; i++) {
      const Tensor& p = params[i];
      if (p.dim() > 1 || (p.numel() != 1 && p.numel() != num)) return;
      Tensor v = p.dim() == 1 && p.size(0) == num ? p : p.reshape(-1).expand(num);
      bool half = p.scalar_type() == at::kBFloat16 && p.scalar_type() == type;
      if (p.scalar_type() != wide && !half) v = v.to(type).to(wide);
      v = v.contiguous();
      values[i] = half ? converted<at::BFloat16, float>(v, wide) : v;
    }
    lay = layout(x, dim, num);
    call.leak = at_of(values[0]); call.sub = at_of(values[1]); call.maxv = at_of(values[2]);
    call.numel = x.numel(); call.channels = lay.channels; call.inner = lay.inner; call.repeat = lay.repeat;
  }
  explicit operator bool() const { return lay.channels; }
};
static Tensor fitted(const Tensor& grad, const Tensor& p) {
  bool half = grad.scalar_type() == at::kFloat && p.scalar_type() == at::kBFloat16;
  if (grad.sizes() == p.sizes() && grad.scalar_type() == p.scalar_type()) return grad;
  if (grad.sizes() == p.sizes() && half) return converted<float, at::BFloat16>(grad, at::kBFloat16);
  return (p.numel() > 1 ? grad : grad.sum()).reshape(p.sizes()).to(p.scalar_type());
}

// == node
struct Made { // signs where the output is kept, none where the input is; slots where a part of the input is, too
  Tensor y, signs;
  I dim;
  std::vector<I> slots;
};
using MaybeTensor = std::optional<Tensor>; // none would not do as an input

// the channels to keep, columns in whole groups of eight, and the place of each among them: as `kept_columns` in cpu.py
static std::vector<I> columns_of(Given& given, I (*lost)(const Call*), std::vector<I>& slots) {
  const Layout& l = given.lay;
  I group = l.inner > 1 ? 1 : 8;
  auto which = std::make_unique<bool[]>(given.num);
  given.call.signs = which.get();
  lost(&given.call);
  given.call.signs = nullptr;
  std::vector<I> columns;
  for (I first = 0; first < l.channels; first += group) {
    I end = std::min(first + group, l.channels);
    bool any = false;
    for (I c = first; c < end; c++) any |= which[c/l.repeat];
    slots.push_back(any ? I(columns.size()) : -1);
    for (I c = first; any && c < end; c++) columns.push_back(c);
  }
  return columns;
}
static Tensor part(const Tensor& x, const Layout& l, I dim, const std::vector<I>& columns) { // differentiable
  Tensor index = at::detail::empty_cpu({I(columns.size())}, at::kLong);
  std::copy(columns.begin(), columns.end(), index.mutable_data_ptr<I>());
  return (x.is_contiguous() ? x : x.movedim(dim, -1)).view({l.outer, l.channels, l.inner}).index_select(1, index);
}

struct Curve : torch::autograd::Function<Curve> {
  static constexpr bool is_traceable = true; // for compiled autograd

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& leak, const Tensor& sub,
                        const Tensor& maxv, const MaybeTensor& part, const Made& made) {
    std::vector<I> how = x.strides().vec();
    how.push_back(made.dim);
    ctx->saved_data["how"] = std::move(how);
    variable_list kept{leak, sub, maxv, made.signs.defined() ? made.y : x};
    if (made.signs.defined()) kept.push_back(made.signs);
    if (part) kept.push_back(*part);
    if (part) ctx->saved_data["slots"] = made.slots;
    ctx->save_for_backward(std::move(kept));
    return made.y;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& gs) {
    variable_list saved = ctx->get_saved_variables(), grads(6);
    std::vector<I> strides = ctx->saved_data["how"].toIntVector(), slots;
    if (saved.size() == 6) slots = ctx->saved_data["slots"].toIntVector();
    I dim = strides.back();
    strides.pop_back();
    bool need[4];
    for (int i = 0; i < 4; i++) need[i] = ctx->needs_input_grad(i);
    if (at::GradMode::is_enabled() || !in_memory(gs[0], saved, strides, dim, slots, need, grads))
      in_python(gs[0], saved, strides, dim, slots, need, grads);
    if (saved.size() == 6 && !torch::autograd::get_current_node()) // a compiled graph adds up even what is nothing
      grads[4] = at::zeros_like(saved[5]);
    return grads;
  }

  static bool in_memory(Tensor g, const variable_list& saved, at::IntArrayRef strides, I dim, std::vector<I>& slots,
                        const bool* need, variable_list& grads) {
    if (watched() || !ordinary(g)) return false;
    for (const Tensor& t : saved) if (!ordinary(t) || !within(t)) return false;
    const Tensor& first = saved[3];
    bool whole = saved.size() == 4;
    if (first.strides() != strides || row(first.scalar_type()) < 0) return false;
    for (size_t i = 4; i < saved.size(); i++) if (!saved[i].is_contiguous()) return false;
    at::AutoDispatchBelowADInplaceOrView below;
    Given given(first, saved.data(), dim);
    if (!given) return false;
    if (g.strides() != strides || g.scalar_type() != first.scalar_type()) g = like(first).copy_(g);
    else if (!within(g)) return false;
    Tensor dx = like(first), sums[3];
    for (Tensor& t : sums) t = at::detail::empty_cpu({given.num}, given.values[0].scalar_type());
    Call& call = given.call;
    call.g = at_of(g); call.dx = at_of(dx);
    call.dleak = at_of(sums[0]); call.dsub = at_of(sums[1]); call.dmaxv = at_of(sums[2]);
    if (whole) { call.kept = at_of(first); call.width = call.channels; }
    else { call.y = at_of(first); call.signs = at_of(saved[4]); }
    if (!slots.empty()) { call.kept = at_of(saved[5]); call.slot = slots.data(); call.width = saved[5].size(1); }
    if (kernels[row(first.scalar_type())][BACKWARD](&call)) return false;
    if (need[0]) grads[0] = std::move(dx);
    for (int i = 0; i < 3; i++) if (need[i + 1]) grads[i + 1] = fitted(sums[i], saved[i]);
    return true;
  }

  static void in_python(const Tensor& g, const variable_list& saved, const std::vector<I>& strides, I dim,
                        const std::vector<I>& slots, const bool* need, variable_list& grads) {
    py::gil_scoped_acquire gil;
    py::tuple needs = py::make_tuple(need[0], need[1], need[2], need[3]);
    py::tuple found = py::handle(otherwise)(g, saved, py::tuple(py::cast(strides)), dim, slots, needs);
    for (int i = 0; i < 4; i++) if (!found[i].is_none()) grads[i] = found[i].cast<Tensor>();
  }
};

// == entrance
static Tensor computed(const Tensor& x, const Tensor* params, I dim) { // undefined where Python is to compute it
  const Tensor* all[] = {&x, params, params + 1, params + 2};
  bool graph = false;
  for (auto t : all) graph |= t->requires_grad();
  graph &= at::GradMode::is_enabled();
  if (watched()) return {};
  for (auto t : all) if (!ordinary(*t) && (graph || t->key_set() != frozen)) return {};
  for (auto t : all) if (!within(*t)) return {};
  if (row(x.scalar_type()) < 0 || x.numel() == 0) return {};
  auto& kernel = kernels[row(x.scalar_type())];
  Made made{{}, {}, dim, {}};
  std::vector<I> columns;
  Layout l;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    Given given(x, params, dim);
    if (!given) return {};
    Call& call = given.call;
    l = given.lay;
    I lost = graph && params[0].requires_grad() ? kernel[LOST](&call) : 0;
    if (lost && lost < given.num) columns = columns_of(given, kernel[LOST], made.slots);
    made.y = like(x);
    if (graph && lost < given.num && I(columns.size()) < l.channels) {
      made.signs = l.inner > 1 ? at::detail::empty_cpu({l.outer, l.channels, (l.inner + 7)/8}, at::kByte)
                               : at::detail::empty_cpu({l.outer, (l.channels + 7)/8}, at::kByte);
      call.signs = at_of(made.signs);
    }
    call.x = at_of(x); call.y = at_of(made.y);
    if (kernel[FORWARD](&call)) return {};
  }
  if (!graph) return made.y;
  MaybeTensor kept;
  if (made.signs.defined() && !columns.empty()) kept = part(x, l, dim, columns);
  return Curve::apply(x, params[0], params[1], params[2], kept, made);
}

// curve(x, leak, sub, maxv, channel_dim): the output, or None
static PyObject* curve(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  for (int i = 0; i < 4; i++) if (!THPVariable_CheckExact(args[i])) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(args[0]);
  Tensor params[3], y;
  for (int i = 0; i < 3; i++) params[i] = THPVariable_Unpack(args[i + 1]);
  I dim = PyLong_AsLongLong(args[4]);
  if (PyErr_Occurred()) { PyErr_Clear(); Py_RETURN_NONE; }
  { py::gil_scoped_release no_gil; y = computed(x, params, dim); }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}
// setup(otherwise, addresses of the kernels)
static PyObject* setup(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  otherwise = Py_NewRef(args[0]);
  for (int i = 0; i < 3*KINDS; i++)
    kernels[i/KINDS][i%KINDS] = (I (*)(const Call*))PyLong_AsVoidPtr(PyTuple_GetItem(args[1], i));
  for (bool inference : {false, true}) {
    c10::InferenceMode mode(inference);
    (inference ? frozen : usual) = at::detail::empty_cpu({0}, at::kFloat).key_set();
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}
static PyMethodDef methods[] = {{"curve", (PyCFunction)(void (*)())curve, METH_FASTCALL, nullptr},
                                {"setup", (PyCFunction)(void (*)())setup, METH_FASTCALL, nullptr}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "learned_relu_node", nullptr, -1, methods, {}, {}, {}, {}};
PyMODINIT_FUNC PyInit_learned_relu_node() { return PyModule_Create(&module); }
